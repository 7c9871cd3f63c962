/* A libcuda.so.1 for the tests: the prototypes are cuda.h's, so that the C compiler holds the calls
   of weightpool/libcuda.py against them. Every call appends its name and arguments to a log. */
#include <cuda.h>
#include <stdio.h>
#include <string.h>

static char log_text[1 << 16];
#define LOG(...) snprintf(log_text + strlen(log_text), sizeof log_text - strlen(log_text), __VA_ARGS__)
#define U(value) ((unsigned long long)(value))

const char *stub_log(void) { return log_text; }

CUresult cuGetErrorName(CUresult code, const char **text) {
  *text = code == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)0x1234567890ULL;
  LOG("retain %d\n", device);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { LOG("current %llx\n", U(context)); return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute number, CUdevice device) {
  LOG("attribute %d %d\n", number, device);
  *value = number != CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
  for (int i = 0; i < 16; i++) uuid->bytes[i] = (char)(i == 3 ? 0 : 16 * device + i);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetP2PAttribute(int *value, CUdevice_P2PAttribute number, CUdevice a, CUdevice b) {
  LOG("p2p %d %d %d\n", number, a, b);
  *value = number == CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED;
  return CUDA_SUCCESS;
}
static void log_prop(const char *name, const CUmemAllocationProp *prop) {
  LOG("%s %d %d %d %d", name, prop->type, prop->requestedHandleTypes, prop->location.type,
      prop->location.id);
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
  log_prop("granularity", prop);
  LOG(" %d\n", option);
  *size = 2 << 20;
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *prop, unsigned long long flags) {
  log_prop("create", prop);
  LOG(" %llu %llu\n", U(size), flags);
  *handle = 0xABCDEF0123456789ULL;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr wanted,
                             unsigned long long flags) {
  LOG("reserve %llu %llu %llu %llu\n", U(size), U(alignment), U(wanted), flags);
  *address = 0x7F0000000000ULL;
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  LOG("map %llx %llu %llu %llx %llu\n", U(address), U(size), U(offset), U(handle), flags);
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *desc, size_t count) {
  LOG("access %llx %llu %d %d %d %llu\n", U(address), U(size), desc->location.type,
      desc->location.id, desc->flags, U(count));
  return desc->location.id == 9 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  LOG("unmap %llx %llu\n", U(address), U(size));
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  LOG("unreserve %llx %llu\n", U(address), U(size));
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  LOG("release %llx\n", U(handle));
  return CUDA_SUCCESS;
}
CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType kind, unsigned long long flags) {
  LOG("export %llx %d %llu\n", U(handle), kind, flags);
  if (kind == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) *(int *)out = 77;
  else for (int i = 0; i < 64; i++) ((CUmemFabricHandle *)out)->data[i] = (unsigned char)(i % 5);
  return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *in,
                                        CUmemAllocationHandleType kind) {
  unsigned sum = 0;
  if (kind == CU_MEM_HANDLE_TYPE_FABRIC)
    for (int i = 0; i < 64; i++) sum += (i + 1) * ((CUmemFabricHandle *)in)->data[i];
  else sum = (unsigned)(size_t)in;
  LOG("import %u %d\n", sum, kind);
  *handle = 0x1122334455667788ULL;
  return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
  LOG("alloc %llu\n", U(size));
  *address = 0x7F1000000000ULL;
  return CUDA_SUCCESS;
}
CUresult cuMemFree_v2(CUdeviceptr address) { LOG("free %llx\n", U(address)); return CUDA_SUCCESS; }
CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
  LOG("ipc %llx\n", U(address));
  for (int i = 0; i < 64; i++) handle->reserved[i] = (char)(i % 7);
  return CUDA_SUCCESS;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
  unsigned sum = 0;
  for (int i = 0; i < 64; i++) sum += (i + 1) * (unsigned)handle.reserved[i];
  LOG("ipc open %u %u\n", sum, flags);
  *address = 0x7F2000000000ULL;
  return CUDA_SUCCESS;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
  LOG("ipc close %llx\n", U(address));
  return CUDA_SUCCESS;
}
CUresult cuMemHostRegister_v2(void *host, size_t size, unsigned int flags) {
  LOG("register %llx %llu %u\n", U(host), U(size), flags);
  return CUDA_SUCCESS;
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *host, unsigned int flags) {
  LOG("device pointer %llx %u\n", U(host), flags);
  *address = (CUdeviceptr)host + 0x1000;
  return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void *host) { LOG("unregister %llx\n", U(host)); return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}
CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int priority) {
  LOG("stream %u %d\n", flags, priority);
  *stream = (CUstream)0x5566778899ULL;
  return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream s) { LOG("destroy stream %llx\n", U(s)); return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = stream ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuStreamQuery(CUstream stream) {
  return stream == 0 ? CUDA_SUCCESS : stream == (CUstream)1 ? CUDA_ERROR_NOT_READY
                                                            : CUDA_ERROR_ILLEGAL_ADDRESS;
}
CUresult cuEventCreate(CUevent *event, unsigned int flags) {
  LOG("event %u\n", flags);
  *event = (CUevent)0x99AABBCCDDULL;
  return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent e) { LOG("destroy event %llx\n", U(e)); return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) {
  LOG("record %llx %llx\n", U(event), U(stream));
  return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  LOG("wait %llx %llx %u\n", U(stream), U(event), flags);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
  LOG("copy %llx %llx %llu %llx\n", U(target), U(source), U(size), U(stream));
  return CUDA_SUCCESS;
}
CUresult cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr address, cuuint64_t value,
                                 unsigned int flags) {
  LOG("write %llx %llx %llu %u\n", U(stream), U(address), U(value), flags);
  return CUDA_SUCCESS;
}
