#include "context.h"
#include "errors.h"
#include "lminf-test.h"
#include "logprob.h"
#include "module.h"

#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string_view>

namespace py = pybind11;

namespace lminf_python {

using float_array = py::array_t<float, py::array::c_style>;

// The types that llama.cpp's K and V cache can have.
static const std::map<std::string, ggml_type> & cache_types() {
    static const std::map<std::string, ggml_type> types = {
        {"f32", GGML_TYPE_F32},
        {"f16", GGML_TYPE_F16},
        {"bf16", GGML_TYPE_BF16},
        {"q8_0", GGML_TYPE_Q8_0},
        {"q4_0", GGML_TYPE_Q4_0},
        {"q4_1", GGML_TYPE_Q4_1},
        {"iq4_nl", GGML_TYPE_IQ4_NL},
        {"q5_0", GGML_TYPE_Q5_0},
        {"q5_1", GGML_TYPE_Q5_1},
    };
    return types;
}

static ggml_type cache_type(const char * option, const std::string & name) {
    const auto it = cache_types().find(name);
    if (it == cache_types().end()) {
        throw error(error_type::config, std::string(option) + " = '" + name + "': no such type");
    }
    return it->second;
}

static llama_flash_attn_type flash_attn_type(std::optional<bool> enabled) {
    return !enabled ? LLAMA_FLASH_ATTN_TYPE_AUTO
        : *enabled  ? LLAMA_FLASH_ATTN_TYPE_ENABLED
                    : LLAMA_FLASH_ATTN_TYPE_DISABLED;
}

static std::unique_ptr<Context> make_context(std::shared_ptr<Model> model, std::optional<lminf_params> lminf,
    uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, uint32_t n_seq_max, int32_t n_threads, int32_t n_threads_batch,
    std::optional<bool> flash_attn, const std::string & cache_type_k, const std::string & cache_type_v,
    const std::string & store_path) {
    context_options options;
    options.lminf           = lminf;
    options.store_path      = store_path;
    options.n_ctx           = n_ctx;
    options.n_batch         = n_batch;
    options.n_ubatch        = n_ubatch;
    options.n_seq_max       = n_seq_max;
    options.n_threads       = n_threads;
    options.n_threads_batch = n_threads_batch;
    options.flash_attn      = flash_attn_type(flash_attn);
    options.cache_type_k    = cache_type("cache_type_k", cache_type_k);
    options.cache_type_v    = cache_type("cache_type_v", cache_type_v);
    return std::make_unique<Context>(std::move(model), options);
}

static void set_n_threads(Context & context, int32_t n_threads, int32_t n_threads_batch) {
    if (n_threads < 1 || n_threads_batch < 1) {
        throw error(error_type::config, "n_threads and n_threads_batch must be at least 1");
    }
    context.set_n_threads(n_threads, n_threads_batch);
}

static void decode(Context & context, const token_array & tokens, llama_seq_id seq_id,
    const py::object & callers_check, int recall) {
    Context::use held(context, seq_id);
    held.set_recall(recall);
    held.decode(tokens.data(), tokens.size(), false, &callers_check);
}

static size_t decode_ahead(Context & context, const token_array & tokens, llama_seq_id seq_id,
    const py::object & callers_check, int recall) {
    if (tokens.size() < 1) {
        throw error(error_type::config, "tokens: at least one is needed");
    }
    Context::use held(context, seq_id);
    held.set_recall(recall);
    return held.decode_ahead(tokens.data(), static_cast<size_t>(tokens.size()), callers_check);
}

static bool advance(Context & context, llama_token token, llama_seq_id seq_id, int recall) {
    Context::use held(context, seq_id, Context::ahead_tokens::keep);
    return held.advance(token, recall);
}

static void truncate(Context & context, int64_t n_past, llama_seq_id seq_id) {
    Context::use held(context, seq_id);
    held.truncate(n_past);
}

static void forget(Context & context, int64_t end, llama_seq_id seq_id) {
    Context::use held(context, seq_id);
    held.forget(end);
}

static void shift(Context & context, int64_t n_keep, int64_t n_discard, llama_seq_id seq_id) {
    Context::use held(context, seq_id);
    held.shift(n_keep, n_discard);
}

// (position, weight) of the tokens that the last one looked up
static std::vector<std::pair<int64_t, float>> recalled(Context & context, llama_seq_id seq_id) {
    std::vector<lminf_recalled_token> found;
    {
        const Context::use held(context, seq_id, Context::ahead_tokens::keep);
        found = held.recalled();
    }
    std::vector<std::pair<int64_t, float>> result;
    for (const auto & token : found) {
        result.emplace_back(token.pos, token.weight);
    }
    return result;
}

static lminf_middle_stats middle_stats(Context & context, llama_seq_id seq_id) {
    const Context::use held(context, seq_id);

    lminf_middle_stats result{};
    lminf_get_middle_stats(held.ctx(), seq_id, &result);
    return result;
}

static py::bytes get_state(Context & context, llama_seq_id seq_id) {
    PyObject * raw = nullptr;
    {
        const Context::use held(context, seq_id);
        const size_t       size = held.state_size();
        {
            const py::gil_scoped_acquire gil;
            raw = PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size));
            if (!raw) {
                throw py::error_already_set();
            }
        }
        try {
            held.get_state(reinterpret_cast<uint8_t *>(PyBytes_AS_STRING(raw)), size);
        } catch (...) {
            const py::gil_scoped_acquire gil;
            Py_DECREF(raw);
            throw;
        }
    }
    return py::reinterpret_steal<py::bytes>(raw);
}

static void set_state(
    Context & context, const py::bytes & state, std::optional<float_array> logits, llama_seq_id seq_id) {
    if (logits && logits->size() != context.model->n_vocab()) {
        throw error(error_type::config, "logits must have the shape [n_vocab]");
    }
    const std::string_view data = state;
    const float *          last = logits ? logits->data() : nullptr;

    Context::use held(context, seq_id);
    held.set_state(reinterpret_cast<const uint8_t *>(data.data()), data.size());
    if (last) {
        held.set_last_logits(last);
    }
}

static void eval(
    Context & context, const token_array & tokens, float_array & out, llama_seq_id seq_id, int recall) {
    if (out.ndim() != 2 || out.shape(0) != tokens.size() || out.shape(1) != context.model->n_vocab()) {
        throw error(error_type::config, "out must have the shape [n_tokens, n_vocab]");
    }
    float * dst = out.mutable_data();

    Context::use held(context, seq_id);
    held.set_recall(recall);
    held.decode(tokens.data(), tokens.size(), true);
    std::memcpy(dst, llama_get_logits(held.ctx()), out.nbytes());
}

static void eval_batch(
    Context & context, const token_array & tokens, const token_array & seq_ids, float_array & out, int recall) {
    if (seq_ids.size() != tokens.size()) {
        throw error(error_type::config, "tokens and seq_ids must have the same size");
    }
    const int32_t n_vocab = context.model->n_vocab();
    if (out.ndim() != 2 || out.shape(0) != tokens.size() || out.shape(1) != n_vocab) {
        throw error(error_type::config, "out must have the shape [n_tokens, n_vocab]");
    }
    float *           dst   = out.mutable_data();
    const py::ssize_t n     = tokens.size();
    const auto *      token = tokens.data();
    const auto *      ids   = seq_ids.data();

    Context::use held(context, 0);
    held.set_recall(recall);
    held.decode_batch(token, ids, static_cast<size_t>(n));
    for (py::ssize_t i = 0; i < n; i++) {
        const float * logits = llama_get_logits_ith(held.ctx(), static_cast<int32_t>(i));
        std::copy(logits, logits + n_vocab, dst + i * n_vocab);
    }
}

static void score(Context & context, const token_array & tokens, const token_array & targets, float_array & out,
    llama_seq_id seq_id, int recall) {
    if (targets.size() > tokens.size() || out.size() != targets.size()) {
        throw error(error_type::config, "out and targets must have the same size, at most that of tokens");
    }
    context.model->check_tokens(targets.data(), targets.size());
    const int32_t n_vocab = context.model->n_vocab();
    float *       dst     = out.mutable_data();

    Context::use held(context, seq_id);
    held.set_recall(recall);
    held.decode(tokens.data(), tokens.size(), true);
    const float * logits = llama_get_logits(held.ctx());
    for (py::ssize_t i = 0; i < targets.size(); i++) {
        dst[i] = logprob(logits + static_cast<size_t>(i) * n_vocab, n_vocab, targets.data()[i]);
    }
}

static float_array last_logits(Context & context, llama_seq_id seq_id) {
    float_array result(context.model->n_vocab());
    float *     dst = result.mutable_data();

    const Context::use held(context, seq_id);
    std::memcpy(dst, held.last_logits(), result.nbytes());
    return result;
}

static void clear(Context & context) {
    Context::use held(context, 0);
    held.forget_logits();
    llama_memory_clear(llama_get_memory(held.ctx()), false);
}

static bool seq_rm(Context & context, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    Context::use held(context, seq_id);
    held.forget_logits();
    return llama_memory_seq_rm(llama_get_memory(held.ctx()), seq_id, p0, p1);
}

static void seq_cp(Context & context, llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    context.check_seq_id(source);
    Context::use   held(context, target);
    llama_memory_t memory = llama_get_memory(held.ctx());
    p1                    = p1 > llama_memory_seq_pos_max(memory, source) ? -1 : p1;
    if (!lminf_get_params(held.ctx(), nullptr) && (p0 > 0 || p1 >= 0)) { // it would abort the process
        throw error(error_type::config, "llama.cpp copies whole sequences only");
    }
    if (source != target) {
        llama_memory_seq_cp(memory, source, target, p0, p1);
        held.forget_own_logits();
    }
}

static void seq_keep(Context & context, llama_seq_id seq_id) {
    Context::use held(context, seq_id);
    held.forget_logits();
    llama_memory_seq_keep(llama_get_memory(held.ctx()), seq_id);
}

static std::vector<std::string> attention(Context & context) {
    const Context::use held(context, 0);

    std::vector<std::string> result;
    for (int32_t il = 0; const char * text = lminf_get_attention(held.ctx(), il); il++) {
        result.emplace_back(text);
    }
    return result;
}

static lminf_stats stats(Context & context, llama_seq_id seq_id) {
    const Context::use held(context, seq_id);

    lminf_stats result{};
    lminf_get_stats(held.ctx(), seq_id, &result);
    return result;
}

static void use_params(std::optional<lminf_params> params) {
    lminf_use_params(params ? &*params : nullptr);
}

static std::optional<lminf_params> resolved_params(Context & context) {
    const Context::use held(context, 0);

    lminf_params params{};
    return lminf_get_params(held.ctx(), &params) ? std::optional(params) : std::nullopt;
}

template <typename F> static auto with_ctx(F f) {
    return [f](Context & context) {
        const Context::use held(context, 0);
        return f(held.ctx());
    };
}

static bool test_set_position(Context & context, int64_t pos, llama_seq_id seq_id) {
    Context::use held(context, seq_id);
    held.forget_logits();
    return lminf_test_set_position(held.ctx(), seq_id, pos);
}

// Calls a "copy into dst, return the size" function of lminf-test.h twice; None if there is nothing to copy.
template <typename F> static std::optional<py::bytes> copied_bytes(Context & context, llama_seq_id seq_id, F && f) {
    std::string buffer;
    {
        const Context::use held(context, seq_id);
        buffer.resize(size_t{1} << 16);
        buffer.resize(f(held.ctx(), buffer.data(), buffer.size()));
    }
    return buffer.empty() ? std::nullopt : std::optional(py::bytes(buffer));
}

static std::optional<py::bytes> test_get_key(Context & context, int32_t il, int64_t pos, llama_seq_id seq_id) {
    return copied_bytes(context, seq_id, [&](const llama_context * ctx, void * dst, size_t size) {
        return lminf_test_get_key(ctx, seq_id, il, pos, dst, size);
    });
}

static std::optional<py::bytes> test_get_sink_original(Context & context, int32_t il, uint32_t j, llama_seq_id seq_id) {
    return copied_bytes(context, seq_id, [&](const llama_context * ctx, void * dst, size_t size) {
        return lminf_test_get_sink_original(ctx, seq_id, il, j, dst, size);
    });
}

static void test_check_candidates(Context & context, bool check) {
    const Context::use held(context, 0);
    if (!lminf_test_check_candidates(held.ctx(), check)) {
        throw error(error_type::context, "this context has no candidates to check");
    }
}

static std::pair<int64_t, int64_t> test_get_candidates(Context & context) {
    const Context::use held(context, 0);
    std::pair<int64_t, int64_t> result{};
    lminf_test_get_candidates(held.ctx(), &result.first, &result.second);
    return result;
}

static lminf_middle_params make_middle(uint32_t k, bool per_head, uint32_t distance, uint32_t layer_begin,
    uint32_t layer_end, const std::string & type, uint32_t max_tokens, uint32_t n_candidates) {
    lminf_middle_params middle = lminf_default_params().middle;
    middle.k                   = k;
    middle.per_head            = per_head;
    middle.distance            = distance;
    middle.layer_begin         = layer_begin;
    middle.layer_end           = layer_end;
    middle.cache_type          = cache_type("middle.cache_type", type);
    middle.max_tokens          = max_tokens;
    middle.n_candidates        = n_candidates;
    return middle;
}

static lminf_params make_params(uint32_t n_sink, uint32_t n_window, uint32_t n_clamp, uint32_t n_block,
    uint32_t n_rollback, uint32_t n_rebase, bool kept, bool deterministic, std::optional<lminf_middle_params> middle) {
    lminf_params params = lminf_default_params();
    params.n_sink       = n_sink;
    params.n_window     = n_window;
    params.n_clamp      = n_clamp;
    params.n_block      = n_block;
    params.n_rollback   = n_rollback;
    params.n_rebase     = n_rebase;
    params.sink_order   = kept ? LMINF_SINK_ORDER_KEPT : LMINF_SINK_ORDER_CLAMPED;
    params.deterministic = deterministic;
    params.middle        = middle.value_or(params.middle);
    return params;
}

static void register_params(py::module_ & m) {
    py::class_<lminf_middle_params>(m, "MiddleParams")
        .def(py::init(&make_middle), py::kw_only(), py::arg("k"), py::arg("per_head"), py::arg("distance"),
            py::arg("layer_begin"), py::arg("layer_end"), py::arg("cache_type"), py::arg("max_tokens"),
            py::arg("n_candidates"))
        .def_readonly("k", &lminf_middle_params::k)
        .def_readonly("per_head", &lminf_middle_params::per_head)
        .def_readonly("distance", &lminf_middle_params::distance)
        .def_readonly("layer_begin", &lminf_middle_params::layer_begin)
        .def_readonly("layer_end", &lminf_middle_params::layer_end)
        .def_readonly("max_tokens", &lminf_middle_params::max_tokens)
        .def_readonly("n_candidates", &lminf_middle_params::n_candidates);

    py::class_<lminf_params>(m, "Params")
        .def(py::init(&make_params), py::kw_only(), py::arg("n_sink"), py::arg("n_window"), py::arg("n_clamp"),
            py::arg("n_block"), py::arg("n_rollback"), py::arg("n_rebase"), py::arg("kept"),
            py::arg("deterministic") = false, py::arg("middle") = py::none())
        .def_readonly("n_sink", &lminf_params::n_sink)
        .def_readonly("n_window", &lminf_params::n_window)
        .def_readonly("n_clamp", &lminf_params::n_clamp)
        .def_readonly("n_block", &lminf_params::n_block)
        .def_readonly("n_rollback", &lminf_params::n_rollback)
        .def_readonly("n_rebase", &lminf_params::n_rebase)
        .def_readonly("deterministic", &lminf_params::deterministic)
        .def_property_readonly("middle",
            [](const lminf_params & params) { return params.middle.k > 0 ? std::optional(params.middle) : std::nullopt; })
        .def_property_readonly(
            "kept", [](const lminf_params & params) { return params.sink_order == LMINF_SINK_ORDER_KEPT; });
}

static void register_stats(py::module_ & m) {
    py::class_<lminf_stats>(m, "Stats")
        .def_readonly("n_past", &lminf_stats::n_past)
        .def_readonly("n_evicted", &lminf_stats::n_evicted)
        .def_readonly("pos_physical", &lminf_stats::pos_physical)
        .def_readonly("n_placements", &lminf_stats::n_placements)
        .def_readonly("n_rebases", &lminf_stats::n_rebases)
        .def_readonly("n_bytes", &lminf_stats::n_bytes)
        .def_readonly("n_cells", &lminf_stats::n_cells)
        .def_readonly("n_cells_used", &lminf_stats::n_cells_used)
        .def_readonly("n_ring", &lminf_stats::n_ring)
        .def_readonly("sink_distance", &lminf_stats::sink_distance);
}

static void register_middle_stats(py::module_ & m) {
    py::class_<lminf_middle_stats>(m, "MiddleStats")
        .def_readonly("n_stored", &lminf_middle_stats::n_stored)
        .def_readonly("n_retrievable", &lminf_middle_stats::n_retrievable)
        .def_readonly("n_bytes", &lminf_middle_stats::n_bytes)
        .def_readonly("n_bytes_token", &lminf_middle_stats::n_bytes_token)
        .def_readonly("n_bytes_full", &lminf_middle_stats::n_bytes_full)
        .def_readonly("scan_seconds", &lminf_middle_stats::scan_seconds);
}

void register_context(py::module_ & m) {
    register_params(m);
    register_stats(m);
    register_middle_stats(m);

    m.def("use_params", &use_params, py::arg("params").none(true),
        "What llama_init_from_model() gives on this thread: with None plain contexts.");
    m.def("use_environment", &lminf_use_environment, "The environment variables decide that again.");
    m.def("raise_last_error", &raise_last_error, "Raises what was wrong with parameters or model, if anything was.");
    m.def("available_memory", [] {
        const uint64_t n_bytes = lminf_available_memory();
        return n_bytes == UINT64_MAX ? std::nullopt : std::optional(n_bytes);
    });
    m.def("state_version", [] { return LLAMA_STATE_SEQ_VERSION; });
    m.def("cache_types", [] {
        std::vector<std::string> names;
        for (const auto & [name, type] : cache_types()) {
            names.push_back(name);
        }
        return names;
    });

    const auto tokens = py::arg("tokens").noconvert();
    const auto out    = py::arg("out").noconvert();
    const auto seq_id = py::arg("seq_id") = 0;
    const auto recall = py::arg("recall") = static_cast<int>(LMINF_RECALL_OFF);

    py::class_<Context>(m, "Context")
        .def(py::init(&make_context), py::arg("model"), py::kw_only(), py::arg("lminf") = py::none(),
            py::arg("n_ctx") = 0, py::arg("n_batch") = 2048, py::arg("n_ubatch") = 512, py::arg("n_seq_max") = 1,
            py::arg("n_threads") = 1, py::arg("n_threads_batch") = 1, py::arg("flash_attn") = py::none(),
            py::arg("cache_type_k") = "f16", py::arg("cache_type_v") = "f16", py::arg("store_path") = "")
        .def("close", &Context::close)
        .def_property_readonly("closed", &Context::is_closed)
        .def_property_readonly("n_ctx", with_ctx(llama_n_ctx_seq))
        .def_property_readonly("n_batch", with_ctx(llama_n_batch))
        .def_property_readonly("n_ubatch", with_ctx(llama_n_ubatch))
        .def_property_readonly("n_seq_max", with_ctx(llama_n_seq_max))
        .def_property_readonly("params", &resolved_params)
        .def_property_readonly("n_threads", &Context::n_threads)
        .def("set_n_threads", &set_n_threads, py::arg("n_threads"), py::arg("n_threads_batch"))
        .def("n_past", &Context::n_past, seq_id)
        .def("stats", &stats, seq_id)
        .def("attention", &attention)
        .def("middle_stats", &middle_stats, seq_id)
        .def("recalled", &recalled, seq_id)
        .def("decode", &decode, tokens, seq_id, py::arg("check") = py::none(), recall)
        .def("decode_ahead", &decode_ahead, tokens, seq_id, py::arg("check") = py::none(), recall,
            "Appends the first token and decodes the others ahead; returns how many of them.")
        .def("advance", &advance, py::arg("token"), seq_id, recall,
            "Appends a token if it is the next of those decoded ahead, with this way to recall.")
        .def("test_check_candidates", &test_check_candidates, py::arg("check"))
        .def("test_get_candidates", &test_get_candidates)
        .def("truncate", &truncate, py::arg("n_past"), seq_id)
        .def("forget", &forget, py::arg("end"), seq_id)
        .def("shift", &shift, py::arg("n_keep"), py::arg("n_discard"), seq_id)
        .def("get_state", &get_state, seq_id)
        .def("set_state", &set_state, py::arg("state"), py::arg("logits").noconvert() = py::none(), seq_id)
        .def("eval", &eval, tokens, out, seq_id, recall)
        .def("score", &score, tokens, py::arg("targets").noconvert(), out, seq_id, recall)
        .def("last_logits", &last_logits, seq_id)
        .def("clear", &clear)
        .def("eval_batch", &eval_batch, tokens, py::arg("seq_ids").noconvert(), out, recall,
            "Appends tokens to the sequences that they belong to, at once; writes logits [n_tokens, n_vocab].")
        .def("seq_cp", &seq_cp, py::arg("source"), py::arg("target"), py::arg("p0") = -1, py::arg("p1") = -1)
        .def("seq_keep", &seq_keep, seq_id)
        .def("seq_rm", &seq_rm, py::arg("seq_id"), py::arg("p0") = -1, py::arg("p1") = -1)
        .def("test_set_position", &test_set_position, py::arg("pos"), seq_id)
        .def("test_get_key", &test_get_key, py::arg("il"), py::arg("pos"), seq_id)
        .def("test_get_sink_original", &test_get_sink_original, py::arg("il"), py::arg("j"), seq_id);
}

} // namespace lminf_python
