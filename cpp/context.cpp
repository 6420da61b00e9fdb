#include "context.h"

#include "errors.h"
#include "log.h"

#include <algorithm>
#include <vector>

namespace py = pybind11;

namespace lminf_python {

static llama_context_params to_llama(const context_options & options) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = options.n_ctx;
    params.n_batch              = options.n_batch;
    params.n_ubatch             = options.n_ubatch;
    params.n_seq_max            = options.n_seq_max;
    params.n_threads            = options.n_threads;
    params.n_threads_batch      = options.n_threads_batch;
    params.flash_attn_type      = options.flash_attn;
    params.type_k               = options.cache_type_k;
    params.type_v               = options.cache_type_v;
    params.no_perf              = true;
    return params;
}

// What llama.cpp would answer with an abort of the process or a context of another shape.
static void check_options(const context_options & options) {
    if (options.n_ubatch < 1 || options.n_ubatch > options.n_batch) {
        throw error(error_type::config,
            "n_ubatch = " + std::to_string(options.n_ubatch) + ": must be at least 1 and at most n_batch (" +
                std::to_string(options.n_batch) + ")");
    }
    const size_t n_seq_limit = std::min<size_t>(llama_max_parallel_sequences(), options.n_batch);
    if (options.n_seq_max < 1 || options.n_seq_max > n_seq_limit) {
        throw error(error_type::config,
            "n_seq_max = " + std::to_string(options.n_seq_max) + ": must be from 1 to " + std::to_string(n_seq_limit));
    }
    if (ggml_is_quantized(options.cache_type_v) && options.flash_attn == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        throw error(error_type::config,
            "cache_type_v = " + std::string(ggml_type_name(options.cache_type_v)) +
                ": a quantised V cache needs flash attention");
    }
}

void raise_last_error() {
    const std::string reason = lminf_last_error();
    switch (lminf_last_status()) {
        case LMINF_STATUS_CONFIG: throw error(error_type::config, reason);
        case LMINF_STATUS_UNSUPPORTED: throw error(error_type::unsupported_model, reason);
        case LMINF_STATUS_CONTEXT:
        case LMINF_STATUS_OK: break;
    }
}

// A plain context is plain whatever the environment says.
static llama_context * init_plain(llama_model * model, const llama_context_params & params) {
    lminf_use_params(nullptr);
    llama_context * ctx = llama_init_from_model(model, params);
    lminf_use_environment();
    return ctx;
}

Context::Context(std::shared_ptr<Model> model, const context_options & options) :
    model(std::move(model)),
    options(options),
    n_threads_wanted(options.n_threads),
    n_threads_batch_wanted(options.n_threads_batch) {
    check_options(options);

    llama_model *              llama  = this->model->ptr.get();
    const llama_context_params params = to_llama(options);
    const log_scope            scope(this->model->verbose);
    lminf_params               lminf = options.lminf.value_or(lminf_default_params());
    lminf.middle.path                = options.store_path.empty() ? nullptr : options.store_path.c_str();
    {
        const py::gil_scoped_release released;
        ptr.reset(options.lminf ? lminf_init_from_model(llama, params, lminf)
                                : init_plain(llama, params));
    }
    if (!ptr) {
        raise_last_error();
        throw error(error_type::context, scope.explain("llama.cpp could not make the context"));
    }
    if (!llama_get_memory(ptr.get())) {
        throw error(
            error_type::unsupported_model, "the model keeps no context: it is an encoder, and cannot read a stream");
    }
    last_n_past.reset(new std::atomic<int64_t>[options.n_seq_max] {});
    llama_set_abort_callback(ptr.get(), [](void * data) { return static_cast<Context *>(data)->poll(); }, this);
}

void Context::set_n_threads(int32_t n_threads, int32_t n_threads_batch) {
    n_threads_wanted       = n_threads;
    n_threads_batch_wanted = n_threads_batch;
}

// llama.cpp looks at them when a micro-batch begins.
void Context::apply_n_threads() {
    const auto [n_threads, n_threads_batch] = this->n_threads();
    if (n_threads != llama_n_threads(ptr.get()) || n_threads_batch != llama_n_threads_batch(ptr.get())) {
        llama_set_n_threads(ptr.get(), n_threads, n_threads_batch);
    }
}

// Called by the thread that computes, after each operation.
bool Context::poll() {
    const bool stop = interrupt.poll();
    apply_n_threads();
    return stop;
}

void Context::check_seq_id(llama_seq_id seq_id) const {
    if (seq_id < 0 || static_cast<uint32_t>(seq_id) >= options.n_seq_max) {
        throw error(error_type::config,
            "seq_id = " + std::to_string(seq_id) + ": must be from 0 to " + std::to_string(options.n_seq_max - 1));
    }
}

static void refuse_reentry(const std::atomic<std::thread::id> & owner) {
    if (owner == std::this_thread::get_id()) {
        throw error(error_type::state, "used from a signal handler or callback while it is computing");
    }
}

void Context::close() {
    refuse_reentry(owner);
    const py::gil_scoped_release released;
    const std::lock_guard        lock(mutex);
    closed = true;
    ptr.reset();
}

int64_t Context::n_past(llama_seq_id seq_id) const {
    check_seq_id(seq_id);
    return last_n_past[seq_id];
}

Context::use::use(Context & context, llama_seq_id seq_id, ahead_tokens ahead) : context(context), seq_id(seq_id) {
    context.check_seq_id(seq_id);
    refuse_reentry(context.owner);
    released.emplace();
    lock = std::unique_lock(context.mutex);
    if (!context.ptr) {
        throw error(error_type::state, "closed");
    }
    if (ahead == ahead_tokens::take_back) {
        take_back();
    }
    context.owner = std::this_thread::get_id();
}

Context::use::~use() {
    for (uint32_t i = 0; i < context.options.n_seq_max; i++) {
        context.last_n_past[i] = lminf_n_past(ctx(), static_cast<llama_seq_id>(i));
    }
    if (!context.ahead.empty()) {
        context.last_n_past[*context.logits_of] -= static_cast<int64_t>(context.ahead.size());
    }
    context.owner = std::thread::id();
}

void Context::use::throw_decode_error(int32_t status, const std::string & reason) const {
    switch (status) {
        case 1: // no room: an endless context has some unless its store of middle tokens has none
            throw error(error_type::context,
                lminf_get_params(ctx(), nullptr)
                    ? reason
                    : "the context is full (n_ctx = " + std::to_string(llama_n_ctx_seq(ctx())) + ")");
        case 2: throw error(error_type::state, "the computation was aborted");
        default: throw error(error_type::context, reason);
    }
}

void Context::use::decode(
    const llama_token * tokens, size_t n_tokens, bool all_logits, const py::object * callers_check) {
    if (n_tokens < 1 || n_tokens > llama_n_batch(ctx())) {
        throw error(error_type::config,
            std::to_string(n_tokens) + " tokens: decode from 1 to " + std::to_string(llama_n_batch(ctx())) +
                " at once");
    }
    context.model->check_tokens(tokens, n_tokens);

    const std::vector<int8_t> output(all_logits ? n_tokens : 0, 1);
    compute(tokens, n_tokens, all_logits ? output.data() : nullptr, 0, callers_check);
}

size_t Context::use::decode_ahead(
    const llama_token * tokens, size_t n_tokens, const py::object & callers_check) {
    context.model->check_tokens(tokens, n_tokens);
    lminf_stats stats{};
    lminf_get_stats(ctx(), seq_id, &stats);
    int64_t n_most = llama_n_ubatch(ctx());
    if (stats.n_until_rebase > 0) { // else it is due whatever comes
        n_most = std::min(n_most, stats.n_until_rebase);
    }
    n_tokens = std::min(n_tokens, static_cast<size_t>(n_most));

    const std::vector<int8_t> output(n_tokens, 1);
    compute(tokens, n_tokens, output.data(), n_tokens - 1, &callers_check);
    return n_tokens - 1;
}

bool Context::use::advance(llama_token token, int recall) {
    if (n_ahead() == 0 || context.ahead.front() != token || context.recall != recall) {
        return false;
    }
    context.ahead.pop_front();
    context.drawn_pos++;
    return true;
}

// Any last tokens of the last micro-batch can be taken back exactly: what it pushed out of the window stays stored until the next
// one, whatever n_rollback is.
void Context::use::take_back() {
    if (context.ahead.empty()) {
        return;
    }
    const llama_seq_id seq    = *context.logits_of;
    const auto         n      = static_cast<int64_t>(context.ahead.size());
    const float *      logits = llama_get_logits_ith(ctx(), static_cast<int32_t>(-1 - n));

    std::vector<float> kept(logits, logits + context.model->n_vocab());
    if (!lminf_seq_rm(ctx(), seq, lminf_n_past(ctx(), seq) - n, -1)) {
        throw error(error_type::state, lminf_last_error());
    }
    context.ahead.clear();
    context.restored_logits = std::move(kept);
}

void Context::use::compute(const llama_token * tokens, size_t n_tokens, const int8_t * output, size_t n_ahead,
    const py::object * callers_check) {
    const log_scope scope(context.model->verbose);

    forget_logits();
    context.apply_n_threads();
    context.interrupt.restart(callers_check);
    const int32_t status = lminf_decode(ctx(), seq_id, tokens, static_cast<int32_t>(n_tokens), output);
    if (status == 0) {
        llama_synchronize(ctx());
        context.logits_of = seq_id;
        context.ahead.assign(tokens + n_tokens - n_ahead, tokens + n_tokens);
        context.drawn_pos = n_ahead > 0 ? lminf_n_past(ctx(), seq_id) - static_cast<int64_t>(n_ahead) - 1 : -1;
    }
    context.interrupt.rethrow();
    if (status != 0) {
        throw_decode_error(status, scope.explain("llama.cpp could not decode (" + std::to_string(status) + ")"));
    }
}

void Context::use::decode_batch(const llama_token * tokens, const llama_seq_id * seq_ids, size_t n_tokens) {
    if (n_tokens < 1 || n_tokens > llama_n_batch(ctx())) {
        throw error(error_type::config,
            std::to_string(n_tokens) + " tokens: decode from 1 to " + std::to_string(llama_n_batch(ctx())) +
                " at once");
    }
    context.model->check_tokens(tokens, n_tokens);
    for (size_t i = 0; i < n_tokens; i++) {
        context.check_seq_id(seq_ids[i]);
    }

    const std::unique_ptr<llama_batch, void (*)(llama_batch *)> batch(
        new llama_batch(llama_batch_init(static_cast<int32_t>(n_tokens), 0, 1)), [](llama_batch * self) {
            llama_batch_free(*self);
            delete self;
        });
    std::vector<llama_pos> next(llama_n_seq_max(ctx()), -1);
    for (size_t i = 0; i < n_tokens; i++) {
        llama_pos & pos = next[seq_ids[i]];
        if (pos < 0) {
            pos = llama_memory_seq_pos_max(llama_get_memory(ctx()), seq_ids[i]) + 1;
        }
        batch->token[i]     = tokens[i];
        batch->pos[i]       = pos++;
        batch->n_seq_id[i]  = 1;
        batch->seq_id[i][0] = seq_ids[i];
        batch->logits[i]    = 1;
    }
    batch->n_tokens = static_cast<int32_t>(n_tokens);

    const log_scope scope(context.model->verbose);

    forget_logits();
    context.apply_n_threads();
    context.drawn_pos = -1;
    context.interrupt.restart(nullptr);
    const int32_t status = llama_decode(ctx(), *batch);
    context.interrupt.rethrow();
    if (status != 0) {
        throw_decode_error(status, scope.explain("llama.cpp could not decode (" + std::to_string(status) + ")"));
    }
    llama_synchronize(ctx());
}

void Context::use::remove(int64_t p0, int64_t p1) {
    if (!lminf_seq_rm(ctx(), seq_id, p0, p1)) {
        throw error(error_type::state, lminf_last_error());
    }
    forget_logits();
}

void Context::use::truncate(int64_t n_past) {
    const int64_t n_now = lminf_n_past(ctx(), seq_id);
    if (n_past < 0 || n_past > n_now) {
        throw error(error_type::config,
            "n_past = " + std::to_string(n_past) + ": must be from 0 to the present " + std::to_string(n_now));
    }
    if (n_past < n_now) {
        remove(n_past, -1);
    }
}

void Context::use::forget(int64_t end) {
    lminf_params params{};
    if (!lminf_get_params(ctx(), &params)) {
        throw error(error_type::state, "only LM-Infinite forgets a part of its window");
    }
    if (end >= lminf_n_past(ctx(), seq_id)) {
        throw error(error_type::state, "tokens up to position " + std::to_string(end) +
                " cannot be forgotten: the last token stays");
    }
    remove(params.n_sink, end);
}

void Context::use::shift(int64_t n_keep, int64_t n_discard) {
    llama_memory_t  memory = llama_get_memory(ctx());
    const llama_pos n_past = llama_memory_seq_pos_max(memory, seq_id) + 1;
    if (lminf_get_params(ctx(), nullptr)) {
        throw error(error_type::config, "a window of LM-Infinite moves by itself: only plain contexts are shifted");
    }
    if (!lminf_can_shift(ctx())) {
        throw error(error_type::unsupported_model, "llama.cpp cannot shift the context of this model with this cache");
    }
    if (n_keep < 0 || n_discard < 1 || n_keep + n_discard >= n_past) {
        throw error(error_type::config,
            "n_keep = " + std::to_string(n_keep) + ", n_discard = " + std::to_string(n_discard) + " of " +
                std::to_string(n_past) + " tokens: at least one must be discarded, and one behind them stay");
    }
    const auto begin = static_cast<llama_pos>(n_keep);
    const auto end   = static_cast<llama_pos>(n_keep + n_discard);
    if (!llama_memory_seq_rm(memory, seq_id, begin, end)) {
        throw error(error_type::unsupported_model, "llama.cpp cannot remove a part of this model's context");
    }
    llama_memory_seq_add(memory, seq_id, end, -1, begin - end);
    forget_logits();
}

void Context::use::set_recall(int mode) {
    if (!lminf_set_recall(ctx(), static_cast<lminf_recall_mode>(mode))) {
        throw error(error_type::config, "recall: this context stores no middle tokens; pass LMInfConfig(middle=MiddleConfig())");
    }
    context.recall = mode;
}

std::vector<lminf_recalled_token> Context::use::recalled() const {
    const auto get = [this](std::vector<lminf_recalled_token> & found) {
        return lminf_get_recall(
            ctx(), seq_id, context.drawn_pos, found.data(), static_cast<int32_t>(found.size()));
    };
    std::vector<lminf_recalled_token> found;
    found.resize(static_cast<size_t>(get(found)));
    get(found);
    return found;
}

size_t Context::use::state_size() const {
    const log_scope scope(context.model->verbose);
    const size_t    size = llama_state_seq_get_size(ctx(), seq_id);
    if (size == 0) {
        throw error(error_type::state, scope.explain("llama.cpp cannot save this sequence"));
    }
    return size;
}

void Context::use::get_state(uint8_t * dst, size_t size) const {
    const log_scope scope(context.model->verbose);
    if (llama_state_seq_get_data(ctx(), dst, size, seq_id) != size) {
        throw error(error_type::state, scope.explain("llama.cpp could not save this sequence"));
    }
}

bool Context::use::try_set_state(const uint8_t * src, size_t size) {
    // the state of an empty sequence would leave what there is
    llama_memory_seq_rm(llama_get_memory(ctx()), seq_id, -1, -1);
    return size > 0 && llama_state_seq_set_data(ctx(), src, size, seq_id) == size;
}

void Context::use::set_state(const uint8_t * src, size_t size) {
    std::vector<uint8_t> before;
    if (lminf_n_past(ctx(), seq_id) > 0) {
        before.resize(state_size());
        get_state(before.data(), before.size());
    }
    const log_scope scope(context.model->verbose);
    if (try_set_state(src, size)) {
        forget_logits();
        return;
    }
    const std::string reason = scope.explain("the state does not fit");
    if (before.empty()) {
        llama_memory_seq_rm(llama_get_memory(ctx()), seq_id, -1, -1);
    } else {
        try_set_state(before.data(), before.size());
    }
    throw error(error_type::state, reason);
}

void Context::use::set_last_logits(const float * logits) {
    context.restored_logits.assign(logits, logits + context.model->n_vocab());
    context.logits_of = seq_id;
}

const float * Context::use::last_logits() const {
    const float * logits = nullptr;
    if (context.logits_of == seq_id) {
        logits = context.restored_logits.empty() ? llama_get_logits_ith(ctx(), static_cast<int32_t>(-1 - n_ahead()))
                                                 : context.restored_logits.data();
    }
    if (!logits) {
        throw error(error_type::state, "no logits: evaluate a token first");
    }
    return logits;
}

} // namespace lminf_python
