// A llama_context, with or without LM-Infinite, that one thread at a time can use.

#pragma once

#include "interrupt.h"
#include "lminf.h"
#include "model.h"

#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace lminf_python {

struct context_options {
    std::optional<lminf_params> lminf; // nullopt: plain llama.cpp
    std::string                 store_path; // of its middle tokens; empty: memory

    uint32_t              n_ctx           = 0; // 0: the trained length
    uint32_t              n_batch         = 2048;
    uint32_t              n_ubatch        = 512;
    uint32_t              n_seq_max       = 1;
    int32_t               n_threads       = 1;
    int32_t               n_threads_batch = 1;
    llama_flash_attn_type flash_attn      = LLAMA_FLASH_ATTN_TYPE_AUTO;
    ggml_type             cache_type_k    = GGML_TYPE_F16;
    ggml_type             cache_type_v    = GGML_TYPE_F16;
};

struct context_deleter {
    void operator()(llama_context * ctx) const { llama_free(ctx); }
};

// Throws what the last lminf.h function on this thread said about parameters or model, if anything.
void raise_last_error();

class Context {
public:
    Context(std::shared_ptr<Model> model, const context_options & options);

    const std::shared_ptr<Model> model; // outlives the llama_context
    const context_options        options;

    // Held by whoever calls a llama.h or lminf.h function on the context.
    class use;

    // What a use does with tokens that were decoded ahead.
    enum class ahead_tokens { take_back, keep };

    // Waits for the thread that uses the context.
    void close();

    bool is_closed() const { return closed; }

    // Threads that compute one token and several at once, from the next micro-batch on. Never waits: can be called while
    // another thread computes, and from its checks.
    void set_n_threads(int32_t n_threads, int32_t n_threads_batch);

    std::pair<int32_t, int32_t> n_threads() const { return {n_threads_wanted, n_threads_batch_wanted}; }

    // Never waits: while another thread computes, the position before its micro-batch.
    int64_t n_past(llama_seq_id seq_id) const;

    // Throws error_type::config if there is no such sequence.
    void check_seq_id(llama_seq_id seq_id) const;

private:
    void apply_n_threads();
    bool poll();

    std::unique_ptr<llama_context, context_deleter> ptr;
    std::unique_ptr<std::atomic<int64_t>[]>         last_n_past; // of each sequence
    std::mutex                                      mutex;
    std::atomic<std::thread::id>                    owner{};
    std::atomic<bool>                               closed{false};
    std::atomic<int32_t>                            n_threads_wanted;
    std::atomic<int32_t>                            n_threads_batch_wanted;
    std::optional<llama_seq_id> logits_of; // the sequence that the logits belong to, if there are any
    std::vector<float>          restored_logits; // they came with a state; empty: llama.cpp has them
    std::deque<llama_token>     ahead; // llama.cpp's sequence logits_of goes on with them, the one that callers see does not
    int                         recall = LMINF_RECALL_OFF; // lminf_recall_mode of what was decoded last
    int64_t                     drawn_pos = -1; // of the last token, if others were decoded ahead with it; else -1
    interrupt_check             interrupt;
};

// The context is this thread's, and the GIL is released, until the end of the scope. Throws error_type::state if it is
// closed. Tokens that were decoded ahead are taken back first, so that nobody meets them who does not ask for them.
class Context::use {
public:
    use(Context & context, llama_seq_id seq_id, ahead_tokens ahead = ahead_tokens::take_back);
    ~use();

    use(const use &)             = delete;
    use & operator=(const use &) = delete;

    llama_context * ctx() const { return context.ptr.get(); }

    // Appends tokens, at most n_batch, and computes the logits of all of them or of the last one.
    // Raises what a signal handler, or the caller's check (called about every 50 ms), raised meanwhile; then complete
    // micro-batches stay in the sequence.
    void decode(
        const llama_token * tokens, size_t n_tokens, bool all_logits, const pybind11::object * callers_check = nullptr);

    // Appends a token, and decodes others ahead in the same micro-batch: n_past and last_logits() are those of the first one until
    // advance() takes up the next. Of the others fewer are decoded where the micro-batch has no room for them, or where the
    // sequence would be rebased earlier than without them. Returns how many are.
    size_t decode_ahead(const llama_token * tokens, size_t n_tokens, const pybind11::object & callers_check);

    // Appends a token if it is the next of those decoded ahead, with this lminf_recall_mode. false: it is not, nothing changed.
    bool advance(llama_token token, int recall);

    // What the last token looked up that was decoded or taken up, see lminf_get_recall().
    std::vector<lminf_recalled_token> recalled() const;

    // Appends tokens to the sequences that they belong to, in one llama_decode(), and computes the logits of all.
    void decode_batch(const llama_token * tokens, const llama_seq_id * seq_ids, size_t n_tokens);

    // The oldest part of the window is forgotten: everything behind the sink tokens and before position `end`, which is
    // at most the last token's. Throws error_type::state if that is not possible exactly.
    void forget(int64_t end);

    // llama.cpp's own context shift: removes n_discard tokens behind the first n_keep and moves those behind them up.
    // Throws error_type::unsupported_model or error_type::config where llama.cpp would abort.
    void shift(int64_t n_keep, int64_t n_discard);

    // All that the sequence needs to go on bit for bit, but for its last logits.
    size_t state_size() const;
    void   get_state(uint8_t * dst, size_t size) const;

    // What is decoded from now on looks up middle tokens. Throws error_type::config if the context stores none.
    void set_recall(int mode); // lminf_recall_mode

    // Throws error_type::state with llama.cpp's reason; the sequence is as it was before then.
    void set_state(const uint8_t * src, size_t size);

    // Logits that a state was saved with, [n_vocab]: last_logits() until something else is computed.
    void set_last_logits(const float * logits);

    // Logits of the last token of this sequence, [n_vocab]. Throws error_type::state if they are not there.
    const float * last_logits() const;

    // See lminf_seq_rm(). Throws error_type::state if that is not possible exactly.
    void remove(int64_t p0, int64_t p1);

    // Removes everything from position n_past on. Throws error_type::state if that is not possible exactly.
    void truncate(int64_t n_past);

    // After anything else than decode() changed a sequence.
    void forget_logits() {
        context.logits_of.reset();
        context.restored_logits.clear();
    }

    // After anything else than decode() changed this sequence and no other.
    void forget_own_logits() {
        if (context.logits_of == seq_id) {
            forget_logits();
        }
    }

private:
    bool try_set_state(const uint8_t * src, size_t size);

    void compute(const llama_token * tokens, size_t n_tokens, const int8_t * output, size_t n_ahead,
        const pybind11::object * callers_check);
    void take_back();

    int64_t n_ahead() const { return context.logits_of == seq_id ? static_cast<int64_t>(context.ahead.size()) : 0; }

    [[noreturn]] void throw_decode_error(int32_t status, const std::string & reason) const;

    Context &                                   context;
    const llama_seq_id                          seq_id;
    std::optional<pybind11::gil_scoped_release> released;
    std::unique_lock<std::mutex>                lock;
};

} // namespace lminf_python
