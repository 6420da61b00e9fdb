#include "lminf-memory.h"

#include "lminf-products.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

static constexpr uint32_t STATE_MAGIC   = 0x464e494c; // "LINF"
static constexpr uint32_t STATE_VERSION = 3;
static constexpr uint32_t STATE_END     = 0x444e4546; // "FEND"

lminf_memory::lminf_memory(std::unique_ptr<llama_memory_i> inner, std::shared_ptr<lminf_cache_group> group) :
    group(std::move(group)), inner(std::move(inner)) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(this->inner.get())) {
        recurrent = hybrid->get_mem_recr();
    } else if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(this->inner.get())) {
        recurrent = hybrid_iswa->get_mem_recr();
    }
}

lminf_memory::~lminf_memory() = default;

lminf_memory * lminf_memory::of(const llama_context * ctx) {
    return ctx ? dynamic_cast<lminf_memory *>(llama_get_memory(ctx)) : nullptr;
}

//
// batches
//

llama_memory_context_ptr lminf_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    try {
        if (group->params.deterministic) {
            n_ubatch = largest_ubatch(balloc.get_batch(), n_ubatch);
        }
        return inner->init_batch(balloc, n_ubatch, embd_all);
    } catch (const std::exception & error) { // it would go through llama_decode()
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return nullptr;
    }
}

uint32_t lminf_memory::largest_ubatch(const llama_batch & batch, uint32_t n_ubatch) const {
    std::map<llama_seq_id, int64_t> n_tokens;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        n_tokens[batch.seq_id[i][0]]++;
    }
    for (const auto & [seq_id, n] : n_tokens) {
        if (has_seq(seq_id)) {
            const auto &   seq = get_cache().sequence(seq_id);
            const uint32_t res = (uint32_t) get_cache().get_policy().largest_ubatch(seq.n_past, n, seq.base);
            // several sequences are cut by llama.cpp as their lengths go
            n_ubatch = std::min(n_ubatch, n_tokens.size() == 1 || res >= n_ubatch ? res : 1);
        }
    }
    return n_ubatch;
}

llama_memory_context_ptr lminf_memory::init_full() {
    if (group->params.deterministic) {
        lminf_use_single_row_products(group->lctx);
    }
    return inner->init_full();
}

llama_memory_context_ptr lminf_memory::init_update(llama_context * lctx, bool optimize) {
    return inner->init_update(lctx, optimize);
}

//
// removing
//

void lminf_memory::clear(bool data) {
    inner->clear(data);
}

bool lminf_memory::can_remove(llama_seq_id seq_id, int64_t j0, int64_t j1) const {
    return std::all_of(group->caches.begin(), group->caches.end(), [&](const auto * cache) { return cache->can_remove(seq_id, j0, j1); });
}

bool lminf_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !has_seq(seq_id)) {
        return false;
    }
    if (p0 <= 0 && p1 < 0) {
        empty(seq_id);
        return true;
    }
    if (seq_id < 0 && recurrent) {
        return false; // a recurrent part may refuse when others have removed something
    }
    const llama_seq_id s0 = seq_id < 0 ? 0                                        : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (llama_seq_id) group->damaged.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        const auto [j0, j1] = get_cache().logical_range(s, p0, p1);
        if (!can_remove(s, j0, j1)) {
            LLAMA_LOG_INFO("%s: sequence %d: %s\n", __func__, s, why_not_removed(s, j0, j1).c_str());
            return false;
        }
    }
    return inner->seq_rm(seq_id, p0, p1); // a recurrent part is asked first
}

std::string lminf_memory::why_not_removed(llama_seq_id seq_id, int64_t j0, int64_t j1) const {
    return "[" + std::to_string(j0) + ", " + std::to_string(j1) + ") of " + std::to_string(get_cache().sequence(seq_id).n_past) +
        " tokens cannot be removed exactly: possible are the last n_rollback = " + std::to_string(group->params.n_rollback) +
        " tokens, the oldest part of the window behind the sink tokens, and all";
}

std::string lminf_memory::remove(llama_seq_id seq_id, int64_t p0, int64_t p1) {
    if (!has_seq(seq_id)) {
        return "there is no sequence " + std::to_string(seq_id);
    }
    const auto &  seq    = get_cache().sequence(seq_id);
    const int64_t n_past = seq.n_past;

    p0 = std::max<int64_t>(p0, 0);
    p1 = p1 < 0 ? n_past : std::min(p1, n_past);
    if (p0 >= p1) {
        return "";
    }
    if (p0 == 0 && p1 == n_past) {
        empty(seq_id);
        return "";
    }
    if (!can_remove(seq_id, p0, p1)) {
        return why_not_removed(seq_id, p0, p1);
    }
    if (p1 == n_past) {
        // llama_pos is counted from somewhere behind the beginning in a very long sequence
        const bool is_removed = p0 >= seq.origin && inner->seq_rm(seq_id, (llama_pos) (p0 - seq.origin), -1);
        return is_removed ? "" : "the last " + std::to_string(n_past - p0) + " tokens cannot be removed: a recurrent state cannot be taken back";
    }
    // a recurrent state knows nothing of single tokens: that old ones are forgotten does not concern it
    for (auto * cache : group->caches) {
        cache->remove(seq_id, p0, p1);
    }
    return "";
}

void lminf_memory::empty(llama_seq_id seq_id) {
    if (seq_id < 0) {
        inner->clear(false);
    } else {
        inner->seq_rm(seq_id, -1, -1);
    }
}

void lminf_memory::seq_keep(llama_seq_id seq_id) {
    inner->seq_keep(seq_id);
}

//
// copying
//

std::string lminf_memory::copy(llama_seq_id src, llama_seq_id dst, int64_t p1) {
    for (const llama_seq_id seq_id : { src, dst }) {
        if (!has_seq(seq_id)) {
            return "there is no sequence " + std::to_string(seq_id);
        }
    }
    const int64_t n_past = get_cache().sequence(src).n_past;

    p1 = p1 < 0 ? n_past : std::min(p1, n_past);
    if (src == dst) {
        return p1 == n_past ? "" : "a sequence cannot be cut by copying it to itself";
    }
    if (p1 < n_past && (recurrent || !can_remove(src, p1, n_past))) {
        return "the first " + std::to_string(p1) + " of " + std::to_string(n_past) + " tokens cannot be copied exactly: " +
            (recurrent ? "a recurrent state cannot be taken back" : "what the rest pushed out of the window is gone (see n_rollback)");
    }
    try {
        for (const auto * cache : group->caches) {
            cache->reserve_copy(dst, n_past);
        }
    } catch (const std::exception & error) {
        return error.what();
    }
    if (recurrent) {
        recurrent->seq_cp(src, dst, -1, -1);
    }
    for (auto * cache : group->caches) {
        cache->copy(src, dst, p1);
    }
    return "";
}

void lminf_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }
    std::string reason = "there is no such sequence";
    if (has_seq(seq_id_src) && has_seq(seq_id_dst)) {
        const auto [j0, j1] = get_cache().logical_range(seq_id_src, p0, p1);
        reason = j0 > 0 ? "only the beginning of a sequence can be copied" : copy(seq_id_src, seq_id_dst, j1);
    }
    if (!reason.empty()) {
        LLAMA_LOG_ERROR("%s: [%d, %d) of sequence %d was not copied to sequence %d, and nothing was changed: %s\n", __func__,
                p0, p1, seq_id_src, seq_id_dst, reason.c_str());
    }
}

void lminf_memory::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (shift != 0) {
        LLAMA_LOG_ERROR("%s: an LM-Infinite context needs no context shift and refuses it; nothing was changed\n", __func__);
    }
}

void lminf_memory::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (d != 1) {
        LLAMA_LOG_ERROR("%s: positions of an LM-Infinite context cannot be divided; nothing was changed\n", __func__);
    }
}

//
// positions
//

llama_pos lminf_memory::seq_pos_min(llama_seq_id seq_id) const {
    return has_seq(seq_id) ? inner->seq_pos_min(seq_id) : -1;
}

llama_pos lminf_memory::seq_pos_max(llama_seq_id seq_id) const {
    return has_seq(seq_id) ? inner->seq_pos_max(seq_id) : -1;
}

void lminf_memory::align_recurrent(llama_seq_id seq_id) {
    if (recurrent) {
        recurrent->seq_add(seq_id, -1, -1, get_cache().seq_pos_max(seq_id) - recurrent->seq_pos_max(seq_id));
    }
}

void lminf_memory::renumber(llama_seq_id seq_id) {
    bool renumbered = false;
    for (auto * cache : group->caches) {
        renumbered = cache->renumber(seq_id);
    }
    if (renumbered) {
        align_recurrent(seq_id);
    }
}

bool lminf_memory::set_position(llama_seq_id seq_id, int64_t pos) {
    if (!has_seq(seq_id) || !get_cache().can_set_position(seq_id, pos)) {
        return false;
    }
    for (auto * cache : group->caches) {
        cache->set_position(seq_id, pos);
    }
    align_recurrent(seq_id);
    return true;
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_memory::memory_breakdown() const {
    return inner->memory_breakdown();
}

//
// states: magic number, version, number of sequences; how many parameters each cache has, and these; what the memory writes; a closing mark
//

template <typename T>
static void write_value(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T>
static T read_value(llama_io_read_i & io) {
    T res = {}; // a file that ends early leaves it as it is
    io.read(&res, sizeof(res));
    return res;
}

static uint32_t n_sequences(const lminf_cache_group & group, llama_seq_id seq_id) {
    return seq_id < 0 ? (uint32_t) group.damaged.size() : 1;
}

void lminf_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        throw std::runtime_error("LM-Infinite saves sequences as a whole");
    }
    if (seq_id >= 0 && !has_seq(seq_id)) {
        throw std::runtime_error("there is no sequence " + std::to_string(seq_id));
    }
    for (size_t s = 0; s < group->damaged.size(); ++s) {
        if (group->damaged[s] && (seq_id < 0 || seq_id == (llama_seq_id) s)) {
            throw std::runtime_error("sequence " + std::to_string(s) + " is damaged: moving its keys failed halfway");
        }
    }
    write_value(io, STATE_MAGIC);
    write_value(io, STATE_VERSION);
    write_value(io, n_sequences(*group, seq_id));
    for (const auto * cache : group->caches) {
        const auto parameters = cache->state_parameters();
        write_value(io, (uint32_t) parameters.size());
        for (const auto & [_, value] : parameters) {
            write_value(io, value);
        }
    }
    inner->state_write(io, seq_id, flags);
    write_value(io, STATE_END);
}

void lminf_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        throw std::runtime_error("LM-Infinite restores sequences as a whole");
    }
    if (seq_id >= 0 && !has_seq(seq_id)) {
        throw std::runtime_error("there is no sequence " + std::to_string(seq_id));
    }
    if (read_value<uint32_t>(io) != STATE_MAGIC) {
        throw std::runtime_error("this is not the state of an LM-Infinite cache");
    }
    const auto version = read_value<uint32_t>(io);
    if (version != STATE_VERSION) {
        throw std::runtime_error("the state has version " + std::to_string(version) + " of the format, this library reads version " +
                std::to_string(STATE_VERSION));
    }
    const auto n_seqs = read_value<uint32_t>(io);
    if (n_seqs != n_sequences(*group, seq_id)) {
        throw std::runtime_error("the state holds " + std::to_string(n_seqs) + " sequences");
    }
    for (const auto * cache : group->caches) {
        const auto parameters = cache->state_parameters();
        if (read_value<uint32_t>(io) != parameters.size()) {
            throw std::runtime_error("the state is that of another model");
        }
        for (const auto & [name, value] : parameters) {
            const auto saved = read_value<int64_t>(io);
            if (saved != value) {
                throw std::runtime_error("the state was saved with " + name + " = " + std::to_string(saved) + ", this context has " +
                        std::to_string(value));
            }
        }
    }
    try {
        inner->state_read(io, seq_id, flags);
        if (read_value<uint32_t>(io) != STATE_END) {
            throw std::runtime_error("the state is cut off or damaged");
        }
    } catch (...) {
        // some tensors may be written, and others never will be: nothing of these sequences can be trusted
        empty(seq_id);
        throw;
    }
}
