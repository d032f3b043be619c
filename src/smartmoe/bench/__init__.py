"""Benchmarks that are entries of their own: each reads RUN_DIR/run.json and writes the files of a run directory."""
