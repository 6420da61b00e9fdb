// The memory of a context with LM-Infinite as llama.cpp sees it: whatever memory the model has, with every operation all or nothing.
//
// llama.cpp's memories of several parts – sliding and full layers, attention beside recurrent states – hand an operation to each of their
// parts, and a part that refuses cannot tell the others. So this one stands before them: it asks first, and refuses before anything has
// changed. Made by lminf_create_memory(); exceptions end here, since llama.h has none.

#pragma once

#include "lminf-kv-cache.h"

#include "llama-memory.h"

#include <memory>
#include <string>

class llama_memory_recurrent;

class lminf_memory : public llama_memory_i {
public:
    // inner: made by the model in the scope of this group, of whose caches it has at least one
    lminf_memory(std::unique_ptr<llama_memory_i> inner, std::shared_ptr<lminf_cache_group> group);
    ~lminf_memory() override;

    // the memory of a context that has LM-Infinite, else NULL
    static lminf_memory * of(const llama_context * ctx);

    const lminf_cache_group & get_group() const { return *group; }
    lminf_cache_group &       get_group()       { return *group; }

    // of the full-attention layers
    lminf_kv_cache & get_cache() const { return *group->caches.front(); }

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // Exact or refused. Allowed: the tail, as far back as n_rollback (or everything that is still stored); the oldest part of
    // the window, [n_sink, p1); the whole sequence.
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;

    // A whole sequence, or one cut where a removal is allowed. What is refused is in the log, and nothing has changed.
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    // -1 if there is no such sequence, or it is empty
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // All that a sequence needs to go on bit for bit. state_read() throws: if the state was saved by a context with other parameters,
    // nothing was changed; if it is damaged, the sequences that it was for are empty, in all caches.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    //
    // the same for logical positions (lminf_seq_rm(), lminf_seq_cp()); they tell why they refuse, "" if they do not
    //

    std::string remove(llama_seq_id seq_id, int64_t p0, int64_t p1);
    std::string copy  (llama_seq_id src, llama_seq_id dst, int64_t p1);

    // llama_pos of a sequence starts again from a smaller value if it is large
    void renumber(llama_seq_id seq_id);

    bool set_position(llama_seq_id seq_id, int64_t pos); // test hook

    // A recurrent state cannot be taken back to an earlier token.
    bool is_hybrid() const { return recurrent != nullptr; }

private:
    const std::shared_ptr<lminf_cache_group> group;
    const std::unique_ptr<llama_memory_i>    inner;

    llama_memory_recurrent * recurrent = nullptr; // the states beside the caches, if the model has any

    // How long micro-batches may be, so that positions are rebased where they would be however the text were cut.
    uint32_t largest_ubatch(const llama_batch & batch, uint32_t n_ubatch) const;

    bool has_seq(llama_seq_id seq_id) const { return get_cache().has_seq(seq_id); }

    bool can_remove(llama_seq_id seq_id, int64_t j0, int64_t j1) const; // as far as the caches are concerned
    std::string why_not_removed(llama_seq_id seq_id, int64_t j0, int64_t j1) const;

    void align_recurrent(llama_seq_id seq_id); // after the positions of the caches changed

    void empty(llama_seq_id seq_id); // -1: all
};
