import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import published_clusters as clusters  # noqa: E402

from smartmoe.planner import inputs  # noqa: E402


def test_bars_that_took_no_part_in_the_fit_are_met_as_the_cluster_file_says():
    bars = clusters.read_bars(ROOT / "logs" / "published" / "bars.csv")
    assert len(bars) == 27 and sum(bar.is_training for bar in bars) == 13
    assert sum(len(bar.places) for bar in bars) == 16 + 8 + 12, "figure 8 inky and pinky, figure 10"
    cluster, rates, _ = inputs.read_cluster("inky", ROOT / "scripts")
    mine = [bar for bar in bars if bar.cluster == "inky"]
    ratio = {bar: clusters.ratio_of(bar, cluster, rates, clusters.EXPONENTS) for bar in mine}
    errors = {use: [abs(r - 1) for b, r in ratio.items() if b.is_training == use] for use in (True, False)}
    assert np.mean(errors[True]) < 0.04 and np.mean(errors[False]) < 0.12 and max(errors[False]) < 0.27


def test_the_fit_lowers_the_error_on_the_bars_it_is_given():
    bars = [b for b in clusters.read_bars(ROOT / "logs" / "published" / "bars.csv") if b.cluster == "pinky"]
    cluster, _, _ = inputs.read_cluster("pinky", ROOT / "scripts")
    error = []
    for num_steps in (0, 15):
        rates, found, _ = clusters.fit(bars, "pinky", cluster, clusters.EXPONENTS, num_steps)
        ratios = [clusters.ratio_of(b, found, rates, clusters.EXPONENTS) for b in bars if b.is_training]
        error.append(np.mean(np.log(ratios) ** 2))
    assert error[1] < 0.8 * error[0]
