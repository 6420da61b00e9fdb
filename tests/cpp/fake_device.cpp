#include "fake_device.h"

#include "ggml-backend-impl.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

//
// memory
//

namespace {

// counts calls down to the one that fails
struct failure {
    std::atomic<int>  n { 0 };
    std::atomic<bool> has_failed { false };

    void set(int n_calls) {
        n          = n_calls;
        has_failed = false;
    }

    bool is_due() {
        const bool res = n > 0 && --n == 0;
        has_failed = has_failed || res;
        return res;
    }
};

struct buffer_memory {
    uint8_t * base;  // what tensors point into
    uint8_t * bytes; // what they hold
};

}

// The memory of all devices lies in one range, so that a signal handler can tell it from others.
static constexpr size_t reach_size = size_t(1) << 36; // ThreadSanitizer leaves no more

static uint8_t * reach() {
    static uint8_t * const begin = [] {
        void * res = mmap(nullptr, reach_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (res == MAP_FAILED) {
            perror("no address range for fake devices");
            abort();
        }
        return static_cast<uint8_t *>(res);
    }();
    return begin;
}

// addresses are given out once, so that a pointer into freed memory is noticed too
static uint8_t * take_addresses(size_t size) {
    static std::atomic<size_t> used { 0 };
    const size_t begin = used.fetch_add((size + 4095)/4096*4096 + 4096);
    if (begin + size > reach_size) {
        fprintf(stderr, "fake devices have no addresses left\n");
        abort();
    }
    return reach() + begin;
}

static void report_access(int number, siginfo_t * info, void * /*context*/) {
    const auto * address = static_cast<const uint8_t *>(info->si_addr);
    if (address >= reach() && address < reach() + reach_size) {
        static const char text[] = "the CPU touched the memory of a fake device\n";
        (void) !write(STDERR_FILENO, text, sizeof(text) - 1);
    }
    signal(number, SIG_DFL); // the access is tried again, and ends the process
}

static buffer_memory & memory_of(ggml_backend_buffer_t buffer) {
    return *static_cast<buffer_memory *>(buffer->context);
}

static uint8_t * bytes_of(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, size_t offset = 0) {
    const auto & memory = memory_of(buffer);
    return memory.bytes + (static_cast<uint8_t *>(tensor->data) - memory.base) + offset;
}

static const ggml_backend_buffer_i buffer_interface = {
    /*.free_buffer =*/ [](ggml_backend_buffer_t buffer) {
        free(memory_of(buffer).bytes);
        delete &memory_of(buffer);
    },
    /*.get_base =*/ [](ggml_backend_buffer_t buffer) -> void * { return memory_of(buffer).base; },
    /*.init_tensor =*/ nullptr,
    /*.memset_tensor =*/ [](ggml_backend_buffer_t buffer, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
        memset(bytes_of(buffer, tensor, offset), value, size);
    },
    /*.set_tensor =*/ [](ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
        memcpy(bytes_of(buffer, tensor, offset), data, size);
    },
    /*.get_tensor =*/ [](ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
        memcpy(data, bytes_of(buffer, tensor, offset), size);
    },
    /*.set_tensor_2d =*/ nullptr,
    /*.get_tensor_2d =*/ nullptr,
    /*.cpy_tensor =*/ nullptr, // ggml copies by get and set
    /*.clear =*/ [](ggml_backend_buffer_t buffer, uint8_t value) { memset(memory_of(buffer).bytes, value, buffer->size); },
    /*.reset =*/ nullptr,
};

//
// device
//

struct fake_device::impl {
    fake_device_traits traits;

    failure allocations;
    failure computations;
    std::atomic<int> n_computations { 0 };

    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    ggml_backend_reg         reg;
    ggml_backend_device      device;
    ggml_backend_buffer_type buffers;
    ggml_backend_buffer_type host_buffers;

    explicit impl(fake_device_traits traits);
};

static fake_device::impl & impl_of(ggml_backend_dev_t device) {
    return *static_cast<fake_device::impl *>(device->context);
}

static bool is_host_type(ggml_backend_buffer_type_t buft) {
    const auto & self = impl_of(buft->device);
    return self.traits.host_memory || buft == &self.host_buffers;
}

static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t buft, size_t size) {
    if (impl_of(buft->device).allocations.is_due()) {
        return nullptr;
    }
    void * bytes = nullptr;
    if (posix_memalign(&bytes, 64, size) != 0) {
        return nullptr;
    }
    memset(bytes, 0xff, size); // NaN: what was never written must not be read
    auto * const memory = new buffer_memory{ static_cast<uint8_t *>(bytes), static_cast<uint8_t *>(bytes) };
    if (!is_host_type(buft)) {
        memory->base = take_addresses(size);
    }
    return ggml_backend_buffer_init(buft, buffer_interface, memory, size);
}

static const ggml_backend_buffer_type_i buffer_type_interface = {
    /*.get_name =*/ [](ggml_backend_buffer_type_t buft) { return is_host_type(buft) ? "Fake_Host" : "Fake"; },
    /*.alloc_buffer =*/ allocate,
    /*.get_alignment =*/ [](ggml_backend_buffer_type_t) { return size_t(64); },
    /*.get_max_size =*/ nullptr,
    /*.get_alloc_size =*/ nullptr,
    /*.is_host =*/ is_host_type,
};

//
// computation
//

static bool is_custom(const ggml_tensor * op) {
    return op->op == GGML_OP_CUSTOM || op->op == GGML_OP_MAP_CUSTOM1 || op->op == GGML_OP_MAP_CUSTOM2 ||
        op->op == GGML_OP_MAP_CUSTOM3;
}

// While the CPU computes for the device, tensors point to what they hold.
static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto & self = impl_of(backend->device);
    if (self.computations.is_due()) {
        return GGML_STATUS_FAILED;
    }
    self.n_computations++;

    std::map<ggml_tensor *, void *> pointers; // as they were
    const auto translate = [&](ggml_tensor * tensor) {
        if (!tensor || pointers.count(tensor)) {
            return;
        }
        ggml_backend_buffer_t buffer = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
        if (buffer && buffer->buft == &self.buffers) {
            pointers[tensor] = std::exchange(tensor->data, bytes_of(buffer, tensor));
        }
    };
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_custom(node)) {
            fprintf(stderr, "a custom operation was sent to a device\n");
            abort();
        }
        translate(node);
        for (ggml_tensor * src : node->src) {
            translate(src);
        }
    }
    const ggml_status res = ggml_backend_graph_compute(static_cast<ggml_backend_t>(backend->context), graph);
    for (const auto & [tensor, data] : pointers) {
        tensor->data = data;
    }
    return res;
}

static ggml_backend_t init_backend(ggml_backend_dev_t device, const char * /*params*/) {
    static ggml_guid guid = { 'l', 'm', 'i', 'n', 'f', ' ', 'f', 'a', 'k', 'e', ' ', 'd', 'e', 'v', '.', 0 };

    ggml_backend_i interface = {};
    interface.get_name = [](ggml_backend_t) { return "Fake"; };
    interface.free     = [](ggml_backend_t backend) {
        ggml_backend_free(static_cast<ggml_backend_t>(backend->context));
        delete backend;
    };
    interface.graph_compute = compute;

    ggml_backend_t cpu = ggml_backend_dev_init(impl_of(device).cpu, nullptr);

    const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(impl_of(device).cpu), "ggml_backend_set_n_threads"));
    set_n_threads(cpu, 1);

    return new ggml_backend{ &guid, interface, device, cpu };
}

static const ggml_backend_device_i device_interface = {
    /*.get_name =*/ [](ggml_backend_dev_t) { return "Fake"; },
    /*.get_description =*/ [](ggml_backend_dev_t) { return "a device of the tests"; },
    /*.get_memory =*/ [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = size_t(1) << 34; },
    /*.get_type =*/ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
    /*.get_props =*/ [](ggml_backend_dev_t device, ggml_backend_dev_props * props) {
        *props = {};
        props->name        = ggml_backend_dev_name(device);
        props->description = ggml_backend_dev_description(device);
        props->type        = ggml_backend_dev_type(device);
        ggml_backend_dev_memory(device, &props->memory_free, &props->memory_total);
        props->caps.host_buffer = true;
    },
    /*.init_backend =*/ init_backend,
    /*.get_buffer_type =*/ [](ggml_backend_dev_t device) { return &impl_of(device).buffers; },
    /*.get_host_buffer_type =*/ [](ggml_backend_dev_t device) { return &impl_of(device).host_buffers; },
    /*.buffer_from_host_ptr =*/ nullptr,
    /*.supports_op =*/ [](ggml_backend_dev_t device, const ggml_tensor * op) {
        const auto & self = impl_of(device);
        return (self.traits.claims_custom || !is_custom(op)) && !(self.traits.refuses && self.traits.refuses(op)) &&
            ggml_backend_dev_supports_op(self.cpu, op);
    },
    /*.supports_buft =*/ [](ggml_backend_dev_t device, ggml_backend_buffer_type_t buft) {
        return buft == &impl_of(device).buffers;
    },
    // products of several tokens go to the device even if the weights are the CPU's, as on a GPU those of 32 and more
    /*.offload_op =*/ [](ggml_backend_dev_t, const ggml_tensor * op) { return op->op == GGML_OP_MUL_MAT && op->ne[1] > 1; },
    /*.event_new =*/ nullptr,
    /*.event_free =*/ nullptr,
    /*.event_synchronize =*/ nullptr,
};

static const ggml_backend_reg_i reg_interface = {
    /*.get_name =*/ [](ggml_backend_reg_t) { return "Fake"; },
    /*.get_device_count =*/ [](ggml_backend_reg_t) { return size_t(1); },
    /*.get_device =*/ [](ggml_backend_reg_t reg, size_t) { return &static_cast<fake_device::impl *>(reg->context)->device; },
    /*.get_proc_address =*/ nullptr,
};

fake_device::impl::impl(fake_device_traits traits) :
    traits(std::move(traits)),
    reg{ GGML_BACKEND_API_VERSION, reg_interface, this },
    device{ device_interface, &reg, this },
    buffers{ buffer_type_interface, &device, nullptr },
    host_buffers{ buffer_type_interface, &device, nullptr } {
}

//
// what tests see
//

// ggml keeps what was registered until the process ends
static fake_device::impl * keep(std::unique_ptr<fake_device::impl> self) {
    static std::vector<std::unique_ptr<fake_device::impl>> all;
    all.push_back(std::move(self));
    return all.back().get();
}

fake_device::fake_device(fake_device_traits traits) : self(keep(std::make_unique<impl>(std::move(traits)))) {
    struct sigaction action = {};
    action.sa_sigaction = report_access;
    action.sa_flags     = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS,  &action, nullptr); // what macOS sends

    ggml_backend_register(&self->reg);
}

fake_device::~fake_device() {
    self->traits.refuses = nullptr;
    fail_allocation(0);
    fail_computation(0);
}

ggml_backend_dev_t fake_device::get() const { return &self->device; }

void fake_device::fail_allocation (int n) { self->allocations .set(n); }
void fake_device::fail_computation(int n) { self->computations.set(n); }

bool fake_device::has_failed() const { return self->allocations.has_failed || self->computations.has_failed; }

int fake_device::n_computations() const { return self->n_computations; }
