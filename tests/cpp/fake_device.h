// A GPU without a GPU: a device of ggml that computes on the CPU, and keeps its memory out of the CPU's reach.
//
// A tensor in its memory has a pointer into a range that nobody may read or write, as a GPU's pointer would be. Whatever
// touches it other than through the device ends the process, with a message that says so. Allocations and computations can
// be made to fail. Includes no private headers; fake_device.cpp does.

#pragma once

#include "ggml-backend.h"

#include <functional>

// What a device can and cannot do. In any case it cannot compute what ggml's CPU backend cannot.
struct fake_device_traits {
    bool host_memory   = false; // the CPU reaches its memory, as that of a GPU on the same chip
    bool claims_custom = false; // it takes custom operations too, as a server elsewhere might, but cannot call our functions

    std::function<bool(const ggml_tensor * op)> refuses; // what it cannot compute besides
};

class fake_device {
public:
    explicit fake_device(fake_device_traits traits = {});

    // models and contexts on the device must be gone
    ~fake_device();

    fake_device(const fake_device &) = delete;
    fake_device & operator=(const fake_device &) = delete;

    ggml_backend_dev_t get() const;

    // From now on the n-th call fails, and none after it; 0: none fails. Allocations of device memory and of the host memory that
    // the device pins for the CPU count as one.
    void fail_allocation (int n);
    void fail_computation(int n);

    bool has_failed() const; // one did

    int n_computations() const; // graphs that were computed so far

    struct impl;

private:
    impl * self; // lives as long as ggml's registry
};
