#include "lminf-env.h"

#include <charconv>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

static std::string_view get_env(const char * name) {
    const char * value = std::getenv(name);
    return value ? value : "";
}

[[noreturn]] static void refuse(const char * name, std::string_view value, const char * what) {
    throw std::runtime_error(std::string("environment variable ") + name + " = '" + std::string(value) + "': " + what);
}

static uint32_t to_number(const char * name, std::string_view value) {
    uint32_t res = 0;

    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), res);
    if (error == std::errc::result_out_of_range) {
        refuse(name, value, "larger than 2^32 - 1");
    }
    if (error != std::errc() || end != value.data() + value.size()) {
        refuse(name, value, "not a whole number from 0 on");
    }
    return res;
}

static lminf_sink_order to_sink_order(const char * name, std::string_view value) {
    if (value == "clamped") {
        return LMINF_SINK_ORDER_CLAMPED;
    }
    if (value == "kept") {
        return LMINF_SINK_ORDER_KEPT;
    }
    refuse(name, value, "must be 'clamped' or 'kept'");
}

std::optional<lminf_params> lminf_params_from_env() {
    lminf_params params = lminf_default_params();

    bool any = false;

    const auto read = [&](const char * name, auto & param, auto convert) {
        const auto value = get_env(name);
        if (!value.empty()) {
            param = convert(name, value);
            any   = true;
        }
    };

    read("LMINF_N_SINK",     params.n_sink,     to_number);
    read("LMINF_N_WINDOW",   params.n_window,   to_number);
    read("LMINF_N_CLAMP",    params.n_clamp,    to_number);
    read("LMINF_N_BLOCK",    params.n_block,    to_number);
    read("LMINF_N_ROLLBACK", params.n_rollback, to_number);
    read("LMINF_N_REBASE",   params.n_rebase,   to_number);
    read("LMINF_SINK_ORDER", params.sink_order, to_sink_order);

    params.deterministic = lminf_deterministic_from_env();

    return any || params.deterministic ? std::optional(params) : std::nullopt;
}

// whether it has the value `on`
static bool is_on(const char * name, std::string_view off, std::string_view on, const char * what) {
    const auto value = get_env(name);
    if (!value.empty() && value != off && value != on) {
        refuse(name, value, what);
    }
    return value == on;
}

bool lminf_stock_attention_from_env() {
    return is_on("LMINF_ATTENTION", "lminf", "stock", "must be 'lminf' or 'stock'");
}

bool lminf_deterministic_from_env() {
    return is_on("LMINF_DETERMINISTIC", "0", "1", "must be '0' or '1'");
}
