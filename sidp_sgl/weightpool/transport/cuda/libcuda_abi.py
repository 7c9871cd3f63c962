"""Structures and constants of cuda.h that `libcuda` passes; the tests compare them with those of
cuda-bindings."""

import ctypes
from ctypes import c_char, c_int, c_void_p

from sidp_sgl.weightpool.transport.cuda.driver import HandleKind

HANDLE_TYPES = {HandleKind.POSIX_FD: 0x1, HandleKind.FABRIC: 0x8}
HANDLE_ATTRIBUTES = {HandleKind.POSIX_FD: 103, HandleKind.FABRIC: 128}
VMM_ATTRIBUTE, MEM_OPS_64_BIT_ATTRIBUTE = 102, 122
P2P_ACCESS, P2P_NATIVE_ATOMICS = 0x02, 0x03
NON_BLOCKING, DISABLE_TIMING, LAZY_PEER_ACCESS = 0x1, 0x2, 0x1
PORTABLE_AND_MAPPED = 0x1 | 0x2
NOT_READY, RECOMMENDED = 600, 0x1
_PINNED, _LOCATION_DEVICE, _READ_WRITE = 0x1, 0x1, 0x3


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("requestedHandleTypes", c_int),
        ("location", Location),
        ("win32HandleMetaData", c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class Bytes16(ctypes.Structure):
    _fields_ = (("data", c_char * 16),)


class Bytes64(ctypes.Structure):
    """CUipcMemHandle and CUmemFabricHandle; the former is passed by value."""

    _fields_ = (("data", c_char * 64),)


def allocation_prop(device: int, kind: HandleKind) -> AllocationProp:
    """Pinned memory on `device` that can be exported as `kind`."""
    location = Location(_LOCATION_DEVICE, device)
    return AllocationProp(_PINNED, HANDLE_TYPES[kind], location, None, AllocationFlags())


def access_desc(device: int) -> AccessDesc:
    """Read and write access for `device`."""
    return AccessDesc(Location(_LOCATION_DEVICE, device), _READ_WRITE)
