// How much more this machine can hold. Called by lminf-store.cpp before a store is made, and by lminf.cpp.

#pragma once

#include <cstdint>
#include <string>

// Bytes of memory that this process can still take without pushing anything out: of the machine, and of the control groups that the
// process is in (Linux, version 2). UINT64_MAX if the system does not say. root: in front of the names of the system's files, for tests.
uint64_t lminf_room_in_memory(const std::string & root = "");

// Bytes that the file system has left where this file is, or would be made. UINT64_MAX if the system does not say.
uint64_t lminf_room_on_disk(const std::string & path);

// Bytes of the disk that the file takes already: holes are not counted. 0 if it is not there.
uint64_t lminf_disk_usage(const std::string & path);
