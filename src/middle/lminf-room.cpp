#include "lminf-room.h"

#include <algorithm>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <sys/stat.h>
#include <sys/statvfs.h>
#if defined(__APPLE__)
#include <mach/mach.h>
#else
#include <fstream>
#endif
#endif

//
// memory
//

#if defined(_WIN32)

uint64_t lminf_room_in_memory(const std::string & /*root*/) {
    MEMORYSTATUSEX status = {};
    status.dwLength = sizeof(status);
    return GlobalMemoryStatusEx(&status) ? status.ullAvailPhys : UINT64_MAX;
}

#elif defined(__APPLE__)

uint64_t lminf_room_in_memory(const std::string & /*root*/) {
    vm_statistics64_data_t stats = {};
    mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
    if (host_statistics64(mach_host_self(), HOST_VM_INFO64, (host_info64_t) &stats, &count) != KERN_SUCCESS) {
        return UINT64_MAX;
    }
    // what is inactive is given to whoever asks for it
    return ((uint64_t) stats.free_count + stats.inactive_count)*vm_kernel_page_size;
}

#else

// the number that follows a name in a file of names and numbers; otherwise if it is not there
static uint64_t read_entry(const std::string & path, const std::string & name, uint64_t otherwise) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.compare(0, name.size(), name) == 0) {
            return std::stoull(line.substr(name.size()));
        }
    }
    return otherwise;
}

// a file's only number; otherwise if it is not there, or a word ("max")
static uint64_t read_number(const std::string & path, uint64_t otherwise) {
    std::ifstream file(path);
    uint64_t      res = 0;
    return file >> res ? res : otherwise;
}

// the control group that this process is in, below /sys/fs/cgroup: "" is the outermost that it can see
static std::string read_group(const std::string & path) {
    static const std::string head = "0::";

    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.compare(0, head.size(), head) == 0) {
            return line == "0::/" ? "" : line.substr(head.size());
        }
    }
    return "";
}

uint64_t lminf_room_in_memory(const std::string & root) {
    uint64_t res = read_entry(root + "/proc/meminfo", "MemAvailable:", UINT64_MAX/1024)*1024;

    // the limit of each group holds for all that are in it
    for (std::string group = read_group(root + "/proc/self/cgroup");; group.resize(group.rfind('/'))) {
        const std::string folder = root + "/sys/fs/cgroup" + group;

        const uint64_t limit = read_number(folder + "/memory.max", UINT64_MAX);
        if (limit != UINT64_MAX) {
            const uint64_t used        = read_number(folder + "/memory.current", 0);
            const uint64_t reclaimable = read_entry(folder + "/memory.stat", "inactive_file ", 0); // read from files
            const uint64_t needed      = used - std::min(used, reclaimable);
            res = std::min(res, limit - std::min(limit, needed));
        }
        if (group.find('/') == std::string::npos) {
            return res;
        }
    }
}

#endif

//
// disk
//

#if defined(_WIN32)

uint64_t lminf_room_on_disk(const std::string & path) {
    const size_t      end    = path.find_last_of("/\\");
    const std::string folder = end == std::string::npos ? "." : path.substr(0, end + 1);

    ULARGE_INTEGER n;
    return GetDiskFreeSpaceExA(folder.c_str(), &n, nullptr, nullptr) ? n.QuadPart : UINT64_MAX;
}

uint64_t lminf_disk_usage(const std::string & path) {
    WIN32_FILE_ATTRIBUTE_DATA data;
    return GetFileAttributesExA(path.c_str(), GetFileExInfoStandard, &data) ? (uint64_t) data.nFileSizeHigh << 32 | data.nFileSizeLow : 0;
}

#else

uint64_t lminf_room_on_disk(const std::string & path) {
    const size_t      end    = path.rfind('/');
    const std::string folder = end == std::string::npos ? "." : path.substr(0, end + 1);

    struct statvfs st = {};
    return statvfs(folder.c_str(), &st) == 0 ? (uint64_t) st.f_bavail*st.f_frsize : UINT64_MAX;
}

uint64_t lminf_disk_usage(const std::string & path) {
    struct stat st = {};
    return stat(path.c_str(), &st) == 0 ? (uint64_t) st.st_blocks*512 : 0;
}

#endif
