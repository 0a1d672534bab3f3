// Stand in for libcuda: check what the CUDA driver checks when a kernel is launched, start nothing.
//
// Triton's own driver module and launcher run over it (tests/launch.py). A call that breaks a rule
// of the CUDA driver API returns CUDA_ERROR_INVALID_VALUE; cuGetErrorString then returns the rule
// and the value that breaks it, which Triton puts into its exception. The rules are cuda.h's.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda.h"

#define MUST(rule, ...) do { if (!(rule)) return refuse(__VA_ARGS__); } while (0)

// Compute capability; KB of shared memory that a block may ask for, and that an SM has.
static const struct { int arch, block, sm; } DEVICES[] = {
  {80, 163, 164}, {86, 99, 100}, {87, 163, 164}, {89, 99, 100}, {90, 227, 228}, {100, 227, 228},
  {103, 227, 228}, {120, 99, 100}, {121, 99, 100}}, *device = DEVICES;
typedef struct { char name[200]; int shared, cluster; } Kernel;    // what a CUfunction points to

long standin_launches, standin_maps;     // calls so far, refused ones included
static const char *subject = "";         // the kernel that a message is about
static char message[512];

static CUresult refuse(const char *format, ...) {
  int n = snprintf(message, sizeof message, *subject ? "kernel %s: " : "%s", subject);
  va_list values;
  va_start(values, format);
  vsnprintf(message + n, sizeof message - n, format, values);
  va_end(values);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error ? message : "no error";
  return 0;
}

// Choose the GPU that the stand-in pretends to be; return 0 for one that it does not know.
int standin_select(int arch) {
  for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
    if (DEVICES[i].arch == arch) return (device = DEVICES + i)->arch;
  return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice ordinal) {
  subject = "";
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device->arch / 10; return 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device->arch % 10; return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = device->block * 1024; return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = device->sm * 1024; return 0;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; return 0;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; return 0;
    // Triton reports these and decides nothing by them.
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 100; return 0;
    default: return refuse("device attribute must be one that libcuda.c knows (got %d)", attribute);
  }
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = calloc(1, sizeof *kernel);       // never freed: Triton keeps its kernels
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->shared = 48 * 1024;                       // until cuFuncSetAttribute allows more
  kernel->cluster = 8;
  *function = (CUfunction)kernel;
  return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Kernel *kernel = (Kernel *)function;
  subject = kernel->name;
  switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      MUST(value >= 0 && value <= device->block * 1024, "shared memory must be at most %d bytes on "
           "sm_%d (got %d)", device->block * 1024, device->arch, value);
      kernel->shared = value;
      return 0;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      kernel->cluster = value ? 16 : 8;
      return 0;
    // Triton 3.9 first tries an attribute that drivers do not know yet, and expects this answer.
    default: return refuse("attribute must be one that libcuda.c knows (got %d)", attribute);
  }
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **values, void **extra) {
  const Kernel *kernel = (const Kernel *)f;
  const unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  const size_t threads = (size_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  subject = kernel->name;
  standin_launches++;
  for (int i = 0; i < 3; i++) {
    const unsigned most = i ? 65535 : 2147483647;
    MUST(grid[i] && grid[i] <= most, "grid %c must be 1 to %u (got %u)", "xyz"[i], most, grid[i]);
  }
  MUST(threads && threads <= 1024, "block must be 1 to 1024 threads (got %zu)", threads);
  MUST(c->sharedMemBytes <= kernel->shared, "shared memory must be at most the %d bytes that "
       "cuFuncSetAttribute allowed (got %u)", kernel->shared, c->sharedMemBytes);
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const CUlaunchAttributeID id = c->attrs[i].id;
    MUST(id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE || device->arch >= 90,
         "launch attribute %d must be used from sm_90 on (got sm_%d)", id, device->arch);
    if (id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
    const unsigned x = c->attrs[i].value.clusterDim.x, y = c->attrs[i].value.clusterDim.y,
                   z = c->attrs[i].value.clusterDim.z, size = x * y * z;
    MUST(size && size <= kernel->cluster, "cluster must be 1 to %d blocks (got %u)",
         kernel->cluster, size);
    MUST(grid[0] % x == 0 && grid[1] % y == 0 && grid[2] % z == 0, "grid must be a multiple of its "
         "cluster (got %u, %u, %u by %u, %u, %u)", grid[0], grid[1], grid[2], x, y, z);
  }
  return 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
    void *base, const cuuint64_t *dim, const cuuint64_t *stride, const cuuint32_t *box,
    const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned SIZES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};    // by data type
  static const unsigned SPANS[] = {2048, 32, 64, 128, 128, 128, 128};         // by swizzle
  subject = "";
  standin_maps++;
  MUST(device->arch >= 90, "tensor map must be for sm_90 or later (got sm_%d)", device->arch);
  MUST((size_t)map % 64 == 0, "tensor map must lie at a multiple of 64 (got %p)", (void *)map);
  MUST(type < 13, "data type must be one of whole bytes, 0 to 12 (got %d)", type);
  MUST(rank >= 1 && rank <= 5, "rank must be 1 to 5 (got %u)", rank);
  MUST(!interleave, "interleave must be none, 0 (got %d)", interleave);
  MUST(swizzle <= 6, "swizzle must be 0 to 6 (got %d)", swizzle);
  MUST(base && (size_t)base % 16 == 0, "base must be a multiple of 16, not null (got %p)", base);
  MUST(!fill || type >= 6, "fill must be zero for integers (got NaN)");
  // cuda.h builds each stride from the one inside it: that one times (its dimension + padding).
  // A dimension of one element is never stepped over: its stride only has to be encodable.
  cuuint64_t inner = 1, extent = dim[0] * SIZES[type];
  for (unsigned i = 0; i < rank; i++) {
    MUST(dim[i] && dim[i] <= 1ull << 32, "dimension %u must be 1 to 2^32 (got %llu)", i, dim[i]);
    MUST(box[i] && box[i] <= 256, "box %u must be 1 to 256 (got %u)", i, box[i]);
    MUST(step[i] && step[i] <= 8, "element stride %u must be 1 to 8 (got %u)", i, step[i]);
    const cuuint64_t bytes = i ? stride[i - 1] : 0;
    MUST(bytes % 16 == 0 && bytes < 1ull << 40, "stride of dimension %u must be a multiple of 16 "
         "bytes below 2^40 (got %llu)", i, bytes);
    if (!i || dim[i] == 1) continue;
    MUST(bytes >= extent, "stride of dimension %u must be at least the %llu bytes of what lies "
         "inside it (got %llu)", i, extent, bytes);
    MUST(bytes % inner == 0, "stride of dimension %u must be a multiple of the inner stride of "
         "%llu bytes (got %llu)", i, inner, bytes);
    inner = bytes;
    extent = bytes * dim[i];
  }
  const unsigned row = box[0] * SIZES[type];
  MUST(row % 16 == 0, "inner box must be a multiple of 16 bytes (got %u)", row);
  MUST(row <= SPANS[swizzle], "inner box must be at most the %u bytes of its swizzle (got %u)",
       SPANS[swizzle], row);
  return 0;
}

// Triton also needs these; there is one device and one context, and all memory belongs to it.
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *ordinal, int index) { *ordinal = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *ordinal) { *ordinal = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *to) { *to = 0; return 0; }
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)to = pointer;
  return 0;
}
