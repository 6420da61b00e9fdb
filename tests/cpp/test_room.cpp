// How much memory there is: of the machine, and of the control groups that a process is in, as Linux tells it in files.

#include "check.h"
#include "lminf-room.h"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

namespace fs = std::filesystem;

static uint64_t room(const std::map<std::string, std::string> & files) {
    const fs::path root = fs::temp_directory_path() / "lminf-test-room";
    fs::remove_all(root);
    fs::create_directories(root);
    for (const auto & [name, text] : files) {
        const fs::path path = root / name;
        fs::create_directories(path.parent_path());
        std::ofstream(path) << text;
    }
    const uint64_t res = lminf_room_in_memory(root.string());
    fs::remove_all(root);
    return res;
}

static const std::string meminfo = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\nBuffers:   5 kB\n";

static void test_memory() {
    CHECK(room({}) >= UINT64_MAX/1024*1024); // no limit is known
    CHECK(room({ { "proc/meminfo", meminfo } }) == 8000*1024);

    // in no group that limits anything
    CHECK(room({
        { "proc/meminfo",             meminfo },
        { "proc/self/cgroup",         "0::/\n" },
        { "sys/fs/cgroup/memory.max", "max\n" },
    }) == 8000*1024);

    // a container sees its own group as the outermost
    CHECK(room({
        { "proc/meminfo",                 meminfo },
        { "proc/self/cgroup",             "0::/\n" },
        { "sys/fs/cgroup/memory.max",     "1000000\n" },
        { "sys/fs/cgroup/memory.current", "600000\n" },
    }) == 400000);

    // what was read from files gives way
    CHECK(room({
        { "proc/meminfo",                 meminfo },
        { "sys/fs/cgroup/memory.max",     "1000000\n" },
        { "sys/fs/cgroup/memory.current", "600000\n" },
        { "sys/fs/cgroup/memory.stat",    "anon 100000\nactive_file 200000\ninactive_file 300000\n" },
    }) == 700000);

    // more is used than is allowed: the limit was lowered
    CHECK(room({
        { "proc/meminfo",                 meminfo },
        { "sys/fs/cgroup/memory.max",     "1000\n" },
        { "sys/fs/cgroup/memory.current", "600000\n" },
    }) == 0);

    // the tightest of all groups around the process
    const std::map<std::string, std::string> nested = {
        { "proc/meminfo",                               meminfo },
        { "proc/self/cgroup",                           "1:name=systemd:/elsewhere\n0::/user/session/job\n" },
        { "sys/fs/cgroup/user/memory.max",              "2000000\n" },
        { "sys/fs/cgroup/user/memory.current",          "500000\n" },
        { "sys/fs/cgroup/user/session/memory.max",      "1800000\n" },
        { "sys/fs/cgroup/user/session/memory.current",  "100000\n" },
        { "sys/fs/cgroup/user/session/job/memory.max",  "max\n" },
        { "sys/fs/cgroup/elsewhere/memory.max",         "1\n" },
    };
    CHECK(room(nested) == 1500000);

    // it is not in a group that this process cannot see
    CHECK(room({ { "proc/meminfo", meminfo }, { "proc/self/cgroup", "0::/../../other\n" } }) == 8000*1024);
}

static void test_disk() {
    const fs::path folder = fs::temp_directory_path();
    const fs::path file   = folder / "lminf-test-room-file";
    fs::remove(file);

    const double expected = (double) fs::space(folder).available;
    CHECK(std::abs((double) lminf_room_on_disk(file.string()) - expected) < 0.1*expected); // others write, too
    CHECK(lminf_disk_usage(file.string()) == 0);

    std::ofstream(file) << "x";
    fs::resize_file(file, 100 << 20);
    CHECK(lminf_disk_usage(file.string()) < (1 << 20)); // nearly all of it is a hole
    fs::remove(file);
}

int main() {
    test_memory();
    test_disk();
    return n_failed > 0;
}
