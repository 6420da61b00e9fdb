// Where middle tokens live: keys and values of all tokens of a sequence, as rows of one memory mapping.
//
// Keys stand at position 0 (RoPE taken off) and values are what the cache gets; both are quantised to one type. A row's place is
// given by sequence, layer, KV head and slot, so that the keys of a head lie one after the other for a scan. The mapping is
// anonymous, or a file; either way memory is taken as rows are written. Which slots hold valid rows is not known here: that is
// in the books (lminf_sequence). Called by lminf-kv-cache*.cpp and lminf-recall.cpp; knows nothing of llama.cpp.

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class lminf_store {
public:
    struct layer_shape {
        int64_t n_head;
        int64_t n_embd_k; // of a head
        int64_t n_embd_v;
    };

    // With a path, the file is created, or opened if an equal store made it. Throws std::runtime_error with the reason if that is
    // impossible, if another context has it open, or if the file is something else: nothing is overwritten then.
    lminf_store(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, int64_t n_seqs, const std::string & path);
    ~lminf_store();

    lminf_store(const lminf_store &) = delete;
    lminf_store & operator=(const lminf_store &) = delete;

    const ggml_type type;
    const int64_t   n_slots;

    size_t n_layers() const { return layers.size(); }

    int64_t n_heads(size_t layer) const { return layers[layer].n_head; }

    size_t k_row_size(size_t layer) const { return ggml_row_size(type, layers[layer].n_embd_k); }
    size_t v_row_size(size_t layer) const { return ggml_row_size(type, layers[layer].n_embd_v); }

    // the row of slot 0; that of slot i is i row sizes further on
    uint8_t * k_rows(int64_t seq, size_t layer, int64_t head) const { return data + head_offset(seq, layer, head); }
    uint8_t * v_rows(int64_t seq, size_t layer, int64_t head) const {
        return k_rows(seq, layer, head) + n_slots*k_row_size(layer);
    }

    size_t token_size() const { return n_bytes_slot; } // bytes of one token, all layers and heads together

    bool is_file() const { return !path.empty(); }

    // of the file, drawn when it was made: tells it from another one of the same shape; 0 in memory
    uint64_t id() const;

    // Calls f(rows, size) for each stretch of bytes that slots [slot, slot + n) of a sequence take. n <= n_slots; slots wrap.
    template <typename F>
    void for_each_stretch(int64_t seq, int64_t slot, int64_t n, F && f) const {
        const int64_t n_first = n < n_slots - slot ? n : n_slots - slot;
        for (size_t il = 0; il < layers.size(); ++il) {
            for (int64_t ih = 0; ih < layers[il].n_head; ++ih) {
                for (const auto & [rows, size] : { std::pair(k_rows(seq, il, ih), k_row_size(il)), std::pair(v_rows(seq, il, ih), v_row_size(il)) }) {
                    f(rows + slot*size, n_first*size);
                    if (n > n_first) {
                        f(rows, (n - n_first)*size);
                    }
                }
            }
        }
    }

    // of the bytes of these slots
    uint64_t checksum(int64_t seq, int64_t slot, int64_t n) const;

    void copy(int64_t seq_src, int64_t seq_dst, int64_t slot, int64_t n);

    // Nothing that the sequence has stored is wanted any more: gives its memory back. A file stays as it is.
    void release(int64_t seq);

    // a file's rows are on the disk
    void sync() const;

private:
    struct header;
    class mapping; // lminf-store.cpp: POSIX or Windows

    const std::vector<layer_shape> layers;
    const std::string              path;

    std::vector<size_t> layer_offsets; // of head 0, from the beginning of a sequence
    size_t              n_bytes_seq  = 0;
    size_t              n_bytes_slot = 0;

    std::unique_ptr<mapping> map;
    uint8_t *                data = nullptr; // of sequence 0

    size_t head_offset(int64_t seq, size_t layer, int64_t head) const {
        return seq*n_bytes_seq + layer_offsets[layer] + head*head_size(layer);
    }
    size_t head_size(size_t layer) const;

    std::vector<uint8_t> make_header(uint64_t id) const;
};
