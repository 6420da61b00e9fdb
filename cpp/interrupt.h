// Ctrl-C while the GIL is released: lets Python run its signal handlers now and then and remembers what they raised.
// A caller's own check, such as one for a cancelled request, is called along with them.

#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <optional>

namespace lminf_python {

class interrupt_check {
public:
    // For a thread without the GIL, often: takes it at most every 50 ms. True: stop, an exception is waiting.
    bool poll() {
        if (raised) {
            return true;
        }
        const auto now = clock::now();
        if (now < next) {
            return false;
        }
        pybind11::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) {
            raised.emplace();
        } else if (check && !check->is_none()) {
            call(*check);
        }
        next = clock::now() + interval;
        return raised.has_value();
    }

    // For a thread without the GIL: runs a Python callable and keeps its exception. True: stop.
    template <typename F> bool call(F && f) {
        pybind11::gil_scoped_acquire gil;
        try {
            f();
        } catch (pybind11::error_already_set & err) {
            raised = std::move(err);
        }
        return raised.has_value();
    }

    // Before the work. The caller's check is a Python callable or None, and has to stay alive during the work.
    void restart(const pybind11::object * callers_check = nullptr) {
        next  = clock::now() + interval;
        check = callers_check;
    }

    // After the work, with or without the GIL: raises what was remembered.
    void rethrow() {
        check = nullptr;
        if (raised) {
            auto err = std::move(*raised);
            raised.reset();
            throw err;
        }
    }

private:
    using clock = std::chrono::steady_clock;

    static constexpr auto interval = std::chrono::milliseconds(50);

    clock::time_point                          next  = clock::now() + interval;
    const pybind11::object *                   check = nullptr;
    std::optional<pybind11::error_already_set> raised;
};

} // namespace lminf_python
