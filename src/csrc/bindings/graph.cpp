// Changes to captured CUDA graphs.
#include <vector>

#include "common.h"

#if CUDART_VERSION < 13000  // 12 keeps the form with data of edges beside an older one
#define cudaGraphNodeGetDependencies cudaGraphNodeGetDependencies_v2
#define cudaGraphNodeGetDependentNodes cudaGraphNodeGetDependentNodes_v2
#define cudaGraphAddDependencies cudaGraphAddDependencies_v2
#endif

namespace smartmoe::bindings {
namespace {

constexpr size_t kMostBytes = 1 << 14;  // of a fill that one block does
constexpr unsigned kThreads = 256;

struct Edges {
  std::vector<cudaGraphNode_t> nodes;
  std::vector<cudaGraphEdgeData> data;
};

template <typename Get>
Edges edges_of(Get get, cudaGraphNode_t node) {
  size_t num = 0;
  checked(get(node, nullptr, nullptr, &num), "replace_memsets");
  Edges edges{std::vector<cudaGraphNode_t>(num), std::vector<cudaGraphEdgeData>(num)};
  if (num) checked(get(node, edges.nodes.data(), edges.data.data(), &num), "replace_memsets");
  return edges;
}

void replace(cudaGraph_t graph, cudaGraphNode_t node, const cudaMemsetParams& fill) {
  const Edges before = edges_of(cudaGraphNodeGetDependencies, node);
  const Edges behind = edges_of(cudaGraphNodeGetDependentNodes, node);
  char* to = static_cast<char*>(fill.dst);
  unsigned value = fill.value, element_size = fill.elementSize, num_elements = static_cast<unsigned>(fill.width);
  void* arguments[] = {&to, &value, &element_size, &num_elements};
  cudaKernelNodeParams kernel{};
  kernel.func = smartmoe::fill_function();
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(num_elements < kThreads ? 32 : kThreads);
  kernel.kernelParams = arguments;
  cudaGraphNode_t added;
  checked(cudaGraphAddKernelNode(&added, graph, before.nodes.data(), before.nodes.size(), &kernel), "replace_memsets");
  const std::vector<cudaGraphNode_t> from(behind.nodes.size(), added);
  if (!from.empty()) {
    checked(cudaGraphAddDependencies(graph, from.data(), behind.nodes.data(), behind.data.data(), from.size()),
            "replace_memsets");
  }
  checked(cudaGraphDestroyNode(node), "replace_memsets");
}

}  // namespace

void replace_memsets(int64_t graph_address) {
  auto graph = reinterpret_cast<cudaGraph_t>(graph_address);
  size_t num_nodes = 0;
  checked(cudaGraphGetNodes(graph, nullptr, &num_nodes), "replace_memsets");
  std::vector<cudaGraphNode_t> nodes(num_nodes);
  if (num_nodes) checked(cudaGraphGetNodes(graph, nodes.data(), &num_nodes), "replace_memsets");
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    checked(cudaGraphNodeGetType(node, &type), "replace_memsets");
    if (type != cudaGraphNodeTypeMemset) continue;
    cudaMemsetParams fill{};
    checked(cudaGraphMemsetNodeGetParams(node, &fill), "replace_memsets");
    if (fill.height <= 1 && fill.width * fill.elementSize <= kMostBytes) replace(graph, node, fill);
  }
}

}  // namespace smartmoe::bindings
