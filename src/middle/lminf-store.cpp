#include "lminf-store.h"

#include "lminf-room.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <utility>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

// regions begin at multiples of this, so that each can be given back to the system and rows are aligned
static constexpr size_t N_ALIGN = 65536;

// slots that a file gets room for beyond those that are needed
static constexpr int64_t N_RESERVE = 4096;

static constexpr uint64_t FILE_MAGIC   = 0x31444c444d464e4c; // "LNFMDLD1"
static constexpr size_t   HEADER_SIZE  = 65536;

static uint64_t align_up(uint64_t n) {
    return (n + N_ALIGN - 1)/N_ALIGN*N_ALIGN;
}

//
// the mapping
//

#ifdef _WIN32

class lminf_store::mapping {
public:
    mapping(size_t size, const std::string & path) : size(size) {
        if (!path.empty()) {
            file = CreateFileA(path.c_str(), GENERIC_READ | GENERIC_WRITE, 0, nullptr, OPEN_ALWAYS, FILE_ATTRIBUTE_NORMAL, nullptr);
            if (file == INVALID_HANDLE_VALUE) {
                throw std::runtime_error("the store " + path + " cannot be opened, or another context uses it");
            }
            LARGE_INTEGER n;
            is_new = !GetFileSizeEx(file, &n) || n.QuadPart == 0;
            if (!is_new && (uint64_t) n.QuadPart != size) {
                CloseHandle(file);
                throw std::runtime_error(path + " is no store of middle tokens with these parameters");
            }
        }
        handle = CreateFileMappingA(file, nullptr, PAGE_READWRITE, (DWORD) (size >> 32), (DWORD) size, nullptr);
        addr   = handle ? (uint8_t *) MapViewOfFile(handle, FILE_MAP_ALL_ACCESS, 0, 0, size) : nullptr;
        if (!addr) {
            close();
            throw std::runtime_error("no room for a store of middle tokens of " + std::to_string(size) + " bytes");
        }
    }
    ~mapping() { close(); }

    void release(uint8_t *, size_t) {}
    void reserve(const uint8_t *, size_t) {} // a file is as large as the disk has room for
    void sync() const {
        FlushViewOfFile(addr, 0);
        FlushFileBuffers(file);
    }

    uint8_t * addr   = nullptr;
    bool      is_new = true;

private:
    void close() {
        if (addr) {
            UnmapViewOfFile(addr);
        }
        if (handle) {
            CloseHandle(handle);
        }
        if (file != INVALID_HANDLE_VALUE) {
            CloseHandle(file);
        }
    }

    size_t size;
    HANDLE file   = INVALID_HANDLE_VALUE;
    HANDLE handle = nullptr;
};

#else

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

class lminf_store::mapping {
public:
    mapping(size_t size, const std::string & path) : size(size) {
        if (!path.empty()) {
            open_file(path);
        }
        const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;

        void * res = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (res == MAP_FAILED) {
            const std::string reason = strerror(errno);
            close_file();
            throw std::runtime_error("no room for a store of middle tokens of " + std::to_string(size) + " bytes: " + reason);
        }
        addr = (uint8_t *) res;
    }

    ~mapping() {
        munmap(addr, size);
        close_file();
    }

    void release(uint8_t * begin, size_t n) {
        if (fd < 0) {
            madvise(begin, n, MADV_DONTNEED);
        }
    }

    // of a file
    void reserve(const uint8_t * begin, size_t n) {
        const int error = allocate((off_t) (begin - addr), (off_t) n);
        if (error != 0) {
            throw std::runtime_error(strerror(error));
        }
    }

    void sync() const {
        msync(addr, size, MS_SYNC);
    }

    uint8_t * addr   = nullptr;
    bool      is_new = true;

private:
    void open_file(const std::string & path) {
        fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0) {
            throw std::runtime_error("the store " + path + " cannot be opened: " + strerror(errno));
        }
        struct stat st = {};
        std::string reason;
        locked_by = flock(fd, LOCK_EX | LOCK_NB) == 0 ? getpid() : 0;
        if (locked_by == 0) {
            reason = "the store " + path + " is in use by another context";
        } else if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
            reason = path + " is not a regular file";
        } else if (st.st_size != 0 && (uint64_t) st.st_size != size) {
            reason = path + " is no store of middle tokens with these parameters; it was left as it is";
        } else if (st.st_size == 0 && ftruncate(fd, (off_t) size) != 0) {
            reason = "the store " + path + " cannot be made " + std::to_string(size) + " bytes large: " + strerror(errno);
        }
        if (!reason.empty()) {
            close_file();
            throw std::runtime_error(reason);
        }
        is_new = st.st_size == 0;
    }

    // gives a part of the file its room on the disk, and leaves what is in it; 0 or an error number
    int allocate(off_t begin, off_t n) {
#ifdef __APPLE__
        static constexpr off_t N_PAGE = 4096;
        for (off_t i = begin/N_PAGE*N_PAGE; i < begin + n; i += N_PAGE) {
            char byte;
            if (pread(fd, &byte, 1, i) != 1 || pwrite(fd, &byte, 1, i) != 1) {
                return errno;
            }
        }
        return 0;
#else
        int res;
        do {
            res = posix_fallocate(fd, begin, n);
        } while (res == EINTR);
        return res;
#endif
    }

    // A forked child inherits the descriptor, and while one is open the file stays locked. So who has locked it unlocks it, and
    // nobody else: a child that lets go of the store takes nothing from its parent. (Locks of fcntl() are not inherited, but do
    // not keep two contexts of one process apart, and end when either closes the file.)
    void close_file() {
        if (fd < 0) {
            return;
        }
        if (locked_by == getpid()) {
            flock(fd, LOCK_UN);
        }
        close(fd);
        fd = -1;
    }

    size_t size;
    int    fd        = -1;
    pid_t  locked_by = 0;
};

#endif

//
// the store
//

lminf_store::lminf_store(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, const std::string & path) :
    type(type), n_slots(n_slots), layers(std::move(layers)), path(path) {
    for (size_t il = 0; il < this->layers.size(); ++il) {
        layer_offsets.push_back(n_bytes_seq);
        n_bytes_seq  += this->layers[il].n_head*head_size(il);
        n_bytes_slot += this->layers[il].n_head*row_size(il);
    }

}

lminf_store::lminf_store(
        std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, int64_t n_seqs, const std::string & path) :
    lminf_store(std::move(layers), type, n_slots, path) {
    check_room(full_size(n_seqs));

    map  = std::make_unique<mapping>((size_t) full_size(n_seqs), path);
    data = map->addr + HEADER_SIZE;
    n_reserved .resize(n_seqs);
    means_found.resize(n_seqs);

    if (!is_file()) {
        return;
    }
    if (map->is_new || id() == 0) { // 0: made by a process that was ended right then
        map->reserve(map->addr, HEADER_SIZE);
        std::random_device random;
        const auto header = make_header((uint64_t(random()) << 32 | random()) | 1);
        memcpy(map->addr, header.data(), header.size());
    } else {
        const auto header = make_header(id());
        if (memcmp(map->addr, header.data(), header.size()) != 0) {
            throw std::runtime_error(path + " is no store of middle tokens with these parameters; it was left as it is");
        }
        for (int64_t seq = 0; seq < n_seqs; ++seq) {
            look_for_means(seq);
        }
    }
}

lminf_store::~lminf_store() = default;

uint64_t lminf_store::head_size(size_t layer) const {
    return align_up(sketches_size(layer) + (uint64_t) n_slots*(k_row_size(layer) + v_row_size(layer)));
}

uint64_t lminf_store::full_size(int64_t n_seqs) const {
    return HEADER_SIZE + (uint64_t) n_seqs*n_bytes_seq;
}

uint64_t lminf_store::full_size(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, int64_t n_seqs) {
    return lminf_store(std::move(layers), type, n_slots, "").full_size(n_seqs);
}

// An address space that is too small is too small for a file, too: it is mapped.
void lminf_store::check_room(uint64_t size) const {
    const uint64_t limit = (uint64_t) std::numeric_limits<ptrdiff_t>::max();
    const uint64_t room  = is_file() ? lminf_room_on_disk(path) : lminf_room_in_memory();
    const uint64_t taken = is_file() ? lminf_disk_usage(path) : 0;
    if (size <= limit && size - std::min(size, taken) <= room) {
        return;
    }
    const std::string needs = "a store of middle tokens needs " + std::to_string(size) + " bytes";
    if (size > limit) {
        throw lminf_no_room(needs + ", more than a process can have: store fewer tokens (max_tokens) or a smaller type (cache_type)");
    }
    throw lminf_no_room(needs + (is_file() ? " of the disk of " + path : " of memory") + ", and " + std::to_string(room) +
            " are available: " + (is_file() ? "" : "keep it in a file (path), ") +
            "store fewer tokens (max_tokens) or a smaller type (cache_type)");
}

// what a file says of itself: magic, id, shapes
std::vector<uint8_t> lminf_store::make_header(uint64_t id) const {
    std::vector<uint64_t> res = { FILE_MAGIC, id, (uint64_t) type, (uint64_t) n_slots, n_bytes_seq, layers.size() };
    for (const auto & layer : layers) {
        for (const int64_t n : { layer.n_head, layer.n_embd_k, layer.n_embd_v, layer.n_words }) {
            res.push_back((uint64_t) n);
        }
    }
    if (res.size()*sizeof(res[0]) > HEADER_SIZE) {
        throw std::runtime_error("too many layers for a store of middle tokens");
    }
    const auto * bytes = (const uint8_t *) res.data();
    return { bytes, bytes + res.size()*sizeof(res[0]) };
}

void lminf_store::look_for_means(int64_t seq) {
    for (size_t il = 0; il < layers.size(); ++il) {
        for (int64_t ih = 0; ih < layers[il].n_head; ++ih) {
            if (n_words(il) == 0 || mean(seq, il, ih)[0] == 0.0f) {
                means_found[seq] = false;
                return;
            }
        }
    }
    means_found[seq] = true;
}

uint64_t lminf_store::id() const {
    uint64_t res = 0;
    if (is_file()) {
        memcpy(&res, map->addr + sizeof(FILE_MAGIC), sizeof(res));
    }
    return res;
}

// Finds accidents, not forgeries: four lanes of multiply and rotate, fast enough to be bound by memory.
uint64_t lminf_store::checksum(int64_t seq, int64_t slot, int64_t n, bool with_sketches) const {
    static constexpr uint64_t ODD = 0x9e3779b97f4a7c15;

    uint64_t lanes[4] = { 1, 2, 3, 4 };

    const auto mix = [](uint64_t & lane, uint64_t x) {
        lane = (lane ^ x)*ODD;
        lane ^= lane >> 29;
    };

    for_each_stretch(seq, slot, n, [&](const uint8_t * bytes, size_t size) {
        uint64_t words[4];
        size_t   i = 0;
        for (; i + sizeof(words) <= size; i += sizeof(words)) {
            memcpy(words, bytes + i, sizeof(words));
            for (int l = 0; l < 4; ++l) {
                mix(lanes[l], words[l]);
            }
        }
        for (; i < size; ++i) {
            mix(lanes[i % 4], bytes[i]);
        }
    }, with_sketches);

    uint64_t res = (uint64_t) n;
    for (const uint64_t lane : lanes) {
        mix(res, lane);
    }
    return res;
}

void lminf_store::copy(int64_t seq_src, int64_t seq_dst, int64_t slot, int64_t n) {
    const ptrdiff_t distance = (seq_dst - seq_src)*(ptrdiff_t) n_bytes_seq;

    for_each_stretch(seq_src, slot, n, [&](uint8_t * bytes, size_t size) { memcpy(bytes + distance, bytes, size); });
    look_for_means(seq_dst);
}

void lminf_store::reserve(int64_t seq, int64_t n) {
    n = std::min(n, n_slots);
    if (!is_file() || n <= n_reserved[seq]) {
        return;
    }
    n = std::min(n + N_RESERVE, n_slots);
    try {
        for_each_stretch(seq, n_reserved[seq], n - n_reserved[seq],
            [&](uint8_t * rows, size_t size) { map->reserve(rows, size); });
    } catch (const std::runtime_error & error) {
        throw std::runtime_error("the store " + path + " cannot grow: " + error.what());
    }
    n_reserved[seq] = n;
}

void lminf_store::release(int64_t seq) {
    map->release(data + seq*n_bytes_seq, n_bytes_seq);
    look_for_means(seq); // a file's stay
}

void lminf_store::sync() const {
    if (is_file()) {
        map->sync();
    }
}
