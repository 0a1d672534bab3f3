// Stand in for libcuda: check what the CUDA driver checks when a kernel is launched, and start nothing.
//
// Triton's own driver module and launcher run over it (tests/launch.py). A call that breaks a rule of the
// CUDA driver API returns CUDA_ERROR_INVALID_VALUE, and cuGetErrorString then returns the rule and the value
// that breaks it, which Triton puts into its exception. Nothing is enforced beyond cuda.h's documentation.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda.h"

#define KB 1024
#define MUST(rule, ...) do { if (!(rule)) return refuse(__VA_ARGS__); } while (0)

// Compute capability; KB of shared memory that a block may ask for, and that an SM has.
static const struct { int arch, block, sm; } DEVICES[] = {
  {80, 163, 164}, {86, 99, 100}, {87, 163, 164}, {89, 99, 100}, {90, 227, 228}, {100, 227, 228},
  {103, 227, 228}, {120, 99, 100}, {121, 99, 100}}, *device = DEVICES;
typedef struct { char name[256]; int dynamic, non_portable; } Kernel;     // what a CUfunction points to

long standin_launches, standin_maps;      // calls so far, refused ones included
static char message[512];

static CUresult refuse(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return CUDA_ERROR_INVALID_VALUE;
}

// Choose the GPU that the stand-in pretends to be; return 0 for one that it does not know.
int standin_select(int arch) {
  for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
    if (DEVICES[i].arch == arch) return (device = DEVICES + i)->arch;
  return 0;
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = error ? message : "no error"; return 0; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice ordinal) {
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device->arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device->arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device->block * KB; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device->sm * KB; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;   // these decide nothing
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1000000; break;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1024; break;
    default: return refuse("device attribute must be one that libcuda.c knows (got %d)", attribute);
  }
  return 0;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = calloc(1, sizeof *kernel);       // never freed: Triton keeps its kernels
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->dynamic = 48 * KB;                        // until cuFuncSetAttribute allows more
  *function = (CUfunction)kernel;
  return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;     // no static shared memory
  return 0;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel *kernel = (Kernel *)function;
  switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      MUST(value >= 0 && value <= device->block * KB, "kernel %s: the maximum of dynamic shared memory must "
           "be at most %d bytes on sm_%d (got %d)", kernel->name, device->block * KB, device->arch, value);
      kernel->dynamic = value;
      return 0;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: kernel->non_portable = value; return 0;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: return 0;
    // Triton 3.9 asks for "oversized" shared memory first, and takes this answer of today's drivers.
    default: return refuse("kernel %s: attribute must be one that libcuda.c knows (got %d)", kernel->name,
                           attribute);
  }
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  const unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ}, most[] = {2147483647u, 65535, 65535};
  const size_t threads = (size_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  standin_launches++;
  MUST(kernel, "the kernel must be loaded before its launch (got a null function)");
  for (int i = 0; i < 3; i++)
    MUST(grid[i] && grid[i] <= most[i], "kernel %s: grid %c must be 1 to %u (got %u)", kernel->name, "xyz"[i],
         most[i], grid[i]);
  MUST(threads && threads <= 1024, "kernel %s: block must be 1 to 1024 threads (got %zu)", kernel->name,
       threads);
  MUST(c->sharedMemBytes <= kernel->dynamic, "kernel %s: dynamic shared memory must be at most the %d bytes "
       "that cuFuncSetAttribute allowed (got %u)", kernel->name, kernel->dynamic, c->sharedMemBytes);
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const CUlaunchAttributeValue *v = &c->attrs[i].value;
    const unsigned size = v->clusterDim.x * v->clusterDim.y * v->clusterDim.z;
    switch ((int)c->attrs[i].id) {
      case CU_LAUNCH_ATTRIBUTE_COOPERATIVE: break;
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
        MUST(size && size <= (kernel->non_portable ? 16 : 8), "kernel %s: cluster must be 1 to %d blocks (got "
             "%u)", kernel->name, kernel->non_portable ? 16 : 8, size);
        MUST(!(grid[0] % v->clusterDim.x || grid[1] % v->clusterDim.y || grid[2] % v->clusterDim.z),
             "kernel %s: grid must be a multiple of its cluster (got %u, %u, %u)", kernel->name, grid[0],
             grid[1], grid[2]);     // fall through: clusters too need sm_90
      case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
        MUST(device->arch >= 90, "kernel %s: launch attribute %d must be used from sm_90 on (got sm_%d)",
             kernel->name, c->attrs[i].id, device->arch);
        break;
      default: return refuse("kernel %s: launch attribute must be one that libcuda.c knows (got %d)",
                             kernel->name, c->attrs[i].id);
    }
  }
  return 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
    const cuuint64_t *dim, const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *step,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
    CUtensorMapFloatOOBfill fill) {
  static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};    // of CUtensorMapDataType
  static const unsigned SPANS[] = {256 * 8, 32, 64, 128, 128, 128, 128};      // of CUtensorMapSwizzle
  standin_maps++;
  MUST(device->arch >= 90, "tensor map must be for sm_90 or later (got sm_%d)", device->arch);
  MUST((size_t)map % 64 == 0, "tensor map must lie at a multiple of 64 bytes (got %p)", (void *)map);
  MUST(type < 13, "data type must be one of 1 to 8 whole bytes, 0 to 12 (got %d)", type);
  MUST(rank >= 1 && rank <= 5, "rank must be 1 to 5 (got %u)", rank);
  MUST(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "interleave must be none (got %d)", interleave);
  MUST(swizzle <= 6, "swizzle must be 0 to 6 (got %d)", swizzle);
  MUST(base && (size_t)base % 16 == 0, "base must be a multiple of 16, not null (got %p)", base);
  MUST(!fill || type >= 6, "fill must be zero for integers (got NaN)");
  // The documentation builds each stride from the one before it: that stride times (dimension + padding). A
  // dimension of one element is never stepped over, so that its stride only has to be encodable.
  cuuint64_t inner = 1, extent = dim[0] * SIZES[type];
  for (unsigned i = 0; i < rank; i++) {
    MUST(dim[i] && dim[i] <= 1ull << 32, "dimension %u must be 1 to 2^32 (got %llu)", i, dim[i]);
    MUST(box[i] && box[i] <= 256, "box %u must be 1 to 256 (got %u)", i, box[i]);
    MUST(step[i] && step[i] <= 8, "element stride %u must be 1 to 8 (got %u)", i, step[i]);
    if (!i) continue;
    const cuuint64_t bytes = stride[i - 1];
    MUST(bytes % 16 == 0 && bytes < 1ull << 40, "stride of dimension %u must be a multiple of 16 bytes below "
         "2^40 (got %llu)", i, bytes);
    if (dim[i] == 1) continue;
    MUST(bytes >= extent, "stride of dimension %u must be at least the %llu bytes of what lies inside it (got "
         "%llu)", i, extent, bytes);
    MUST(bytes % inner == 0, "stride of dimension %u must be a multiple of the inner stride of %llu bytes "
         "(got %llu)", i, inner, bytes);
    inner = bytes;
    extent = bytes * dim[i];
  }
  MUST(box[0] * SIZES[type] % 16 == 0, "inner box must be a multiple of 16 bytes (got %u)", box[0] * SIZES[type]);
  MUST(box[0] * SIZES[type] <= SPANS[swizzle], "inner box must be at most the %u bytes of its swizzle (got %u)",
       SPANS[swizzle], box[0] * SIZES[type]);
  return 0;
}

// Triton also calls these; there is one device, one context, and any memory is its memory.
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGet(CUdevice *ordinal, int index) { *ordinal = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice ordinal) { *context = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *ordinal) { *ordinal = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *c) { *count = 1; return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return 0;
}
