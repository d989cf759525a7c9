// The part of the CUDA runtime that csrc/cuda/while_graph.cu calls, without a device: graphs are lists of nodes, a
// launch walks them, and any call can be made to fail.
//
//     run REMAINING STOP...   launches a loop over rows that start at stage 0, twice
//     fail CALL               fails in the CALL-th call of the creation
//     node TYPE               a stage that holds a node of this type, in a graph of its own
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

using namespace pydiff;

struct CUgraphNode_st {
  cudaGraphNodeType type;
  const CUgraphNode_st* after;
  cudaGraph_t graph;  // of a child graph or a conditional node
  LoopArgs loop;
  int32_t done;
};

struct CUgraph_st {
  std::vector<cudaGraphNode_t> nodes;
};

struct CUgraphExec_st {
  cudaGraph_t graph;
};

namespace {

int calls = 0, failing = -1, live = 0, stages = 0, uploads = 0;
unsigned condition = 99, initial = 99;
cudaError_t last = cudaSuccess;
std::vector<int32_t> cursor, stop;
cudaGraph_t body = nullptr;

// What every call that makes something returns.
cudaError_t answer() {
  last = calls++ == failing ? cudaErrorMemoryAllocation : cudaSuccess;
  return last;
}

cudaError_t add(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                CUgraphNode_st made) {
  made.after = count ? *after : nullptr;
  *node = new CUgraphNode_st(made);
  graph->nodes.push_back(*node);
  return cudaSuccess;
}

void walk(cudaGraph_t graph) {
  const CUgraphNode_st* before = nullptr;
  for (cudaGraphNode_t node : graph->nodes) {
    if (node->after != before) std::puts("a node does not wait for the one in front of it"), std::exit(1);
    before = node;
    if (node->type == cudaGraphNodeTypeGraph) {
      ++stages;
      for (size_t row = 0; row < cursor.size(); ++row) cursor[row] += cursor[row] < stop[row];
    } else if (node->type == cudaGraphNodeTypeKernel) {
      condition = another_stage(node->loop, node->done, any_row_left(node->loop, 0, 1));
    } else {
      while (condition) walk(node->graph);
    }
  }
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = graph->nodes.size();
  for (size_t k = 0; nodes && k < *count; ++k) nodes[k] = graph->nodes[k];
  return answer();
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) { return *type = node->type, answer(); }
cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  return *graph = node->graph, answer();
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  if (!answer()) *graph = new CUgraph_st, ++live;
  return last;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t, unsigned value,
                                             unsigned flags) {
  if (flags == cudaGraphCondAssignDefault) initial = value;
  return *handle = 1, answer();
}
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                                   const cudaKernelNodeParams* p) {
  auto loop = static_cast<LoopArgs*>(p->kernelParams[0]);
  add(node, graph, after, count, {cudaGraphNodeTypeKernel, {}, {}, *loop, *static_cast<int32_t*>(p->kernelParams[1])});
  return answer();
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
  body = new CUgraph_st;
  params->conditional.phGraph_out = &body;
  add(node, graph, after, count, {params->type, {}, body, {}, 0});
  return answer();
}
cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                                       size_t count, cudaGraph_t child) {
  add(node, graph, after, count, {cudaGraphNodeTypeGraph, {}, child, {}, 0});
  return answer();
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (!answer()) *exec = new CUgraphExec_st{graph}, ++live;
  return last;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return ++uploads, answer(); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  condition = initial;
  return walk(exec->graph), cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return --live, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return --live, cudaSuccess; }

// What nvcc's own code around a kernel calls when a program starts.
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
char __cudaInitModule(void**) { return 0; }
}

int main(int count, char** words) {
  std::string scenario = words[1];
  int32_t remaining = std::atoi(words[2]);
  for (int k = 3; k < count; ++k) stop.push_back(std::atoi(words[k]));
  cursor.assign(stop.size(), 0);
  CUgraphNode_st inner = {cudaGraphNodeTypeKernel, {}, {}, {}, 0};
  if (scenario == "node") inner.type = cudaGraphNodeType(std::atoi(words[2]));
  if (scenario == "fail") failing = std::atoi(words[2]);
  CUgraph_st child{{&inner}};
  CUgraphNode_st outer = {cudaGraphNodeTypeGraph, {}, &child, {}, 0};
  CUgraph_st stage{{&outer}};
  WhileGraph loop;
  const char* what = "";
  LoopArgs args = {cursor.data(), stop.data(), int64_t(stop.size()), &remaining};
  int error = while_graph_create(loop, &stage, args, 0, nullptr, what);
  if (error) {
    std::printf("%d %d %d %d %s\n", error, live, int(cudaGetLastError()), loop.graph || loop.exec, what);
    return 0;
  }
  for (int launch = 0; launch < 2; ++launch) {
    while_graph_launch(loop, nullptr);
    std::printf("%d %d\n", stages, remaining);
  }
  while_graph_destroy(loop);
  std::printf("%d %d\n", live, uploads);
}
