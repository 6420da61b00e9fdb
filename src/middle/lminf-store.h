// Where middle tokens live: keys and values of all tokens of a sequence, as rows of one memory mapping.
//
// Keys stand at position 0 (RoPE taken off) and values are what the cache gets; both are quantised to one type. A row's place is
// given by sequence, layer, KV head and slot, so that the keys of a head lie one after the other for a scan, and so do their
// sketches (lminf-sketch.h), if there are any. The mapping is
// anonymous, or a file; either way memory is taken as rows are written. Which slots hold valid rows is not known here: that is
// in the books (lminf_sequence). Called by lminf-middle.cpp and lminf-recall*.cpp; knows nothing of llama.cpp.

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A store would not fit into memory, or on the disk. what() says how much it needs, how much there is, and what to do.
class lminf_no_room : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

class lminf_store {
public:
    struct layer_shape {
        int64_t n_head;
        int64_t n_embd_k; // of a head
        int64_t n_embd_v;
        int64_t n_words; // 64 bits each, of a key's sketch; 0: there are no sketches
    };

    // With a path, the file is created, or opened if an equal store made it. Throws std::runtime_error with the reason if that is
    // impossible, if another context has it open, or if the file is something else: nothing is overwritten then. Throws
    // lminf_no_room if not all rows would have room, though they take it one by one.
    lminf_store(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, int64_t n_seqs, const std::string & path);
    ~lminf_store();

    lminf_store(const lminf_store &) = delete;
    lminf_store & operator=(const lminf_store &) = delete;

    // bytes of such a store when all of its rows are written
    static uint64_t full_size(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, int64_t n_seqs);

    const ggml_type type;
    const int64_t   n_slots;

    size_t n_layers() const { return layers.size(); }

    int64_t n_heads (size_t layer) const { return layers[layer].n_head; }
    int64_t n_embd_k(size_t layer) const { return layers[layer].n_embd_k; }

    size_t k_row_size(size_t layer) const { return ggml_row_size(type, layers[layer].n_embd_k); }
    size_t v_row_size(size_t layer) const { return ggml_row_size(type, layers[layer].n_embd_v); }

    int64_t n_words(size_t layer) const { return layers[layer].n_words; }

    // With sketches: [0] is not 0 if there is a mean of all keys, which follows, [n_embd_k]. All 0 in the beginning.
    float * mean(int64_t seq, size_t layer, int64_t head) const { return (float *) (data + head_offset(seq, layer, head)); }

    // Whether all heads have one. A sequence's mean stays once it is found. Known without a look at the rows: found_means() says that
    // they are there now, look_for_means() that rows were written by other means than an operation.
    bool has_means     (int64_t seq) const { return means_found[seq]; }
    void found_means   (int64_t seq)       { means_found[seq] = true; }
    void look_for_means(int64_t seq);

    // word w of slot i is [w*n_slots + i]; its factor is [i]
    uint64_t * sketches(int64_t seq, size_t layer, int64_t head) const {
        return (uint64_t *) ((uint8_t *) mean(seq, layer, head) + mean_size(layer));
    }
    ggml_fp16_t * factors(int64_t seq, size_t layer, int64_t head) const {
        return (ggml_fp16_t *) (sketches(seq, layer, head) + n_words(layer)*n_slots);
    }

    // the row of slot 0; that of slot i is i row sizes further on
    uint8_t * k_rows(int64_t seq, size_t layer, int64_t head) const {
        return data + head_offset(seq, layer, head) + sketches_size(layer);
    }
    uint8_t * v_rows(int64_t seq, size_t layer, int64_t head) const {
        return k_rows(seq, layer, head) + n_slots*k_row_size(layer);
    }

    size_t token_size() const { return n_bytes_slot; } // bytes of one token, all layers and heads together

    bool is_file() const { return !path.empty(); }

    const std::string & get_path() const { return path; }

    // of the file, drawn when it was made: tells it from another one of the same shape; 0 in memory
    uint64_t id() const;

    // Calls f(rows, size) for each stretch of bytes that slots [slot, slot + n) of a sequence take, with the means. n <= n_slots;
    // slots wrap. !with_sketches: without them and the means, which tell nothing that the rows do not.
    template <typename F>
    void for_each_stretch(int64_t seq, int64_t slot, int64_t n, F && f, bool with_sketches = true) const {
        const int64_t n_first = n < n_slots - slot ? n : n_slots - slot;

        const auto stretch = [&](uint8_t * rows, size_t row_size) {
            f(rows + slot*row_size, n_first*row_size);
            if (n > n_first) {
                f(rows, (n - n_first)*row_size);
            }
        };
        for (size_t il = 0; il < layers.size(); ++il) {
            for (int64_t ih = 0; ih < layers[il].n_head; ++ih) {
                const int64_t n_sketch = with_sketches ? n_words(il) : 0;
                if (n_sketch > 0) {
                    f((uint8_t *) mean(seq, il, ih), mean_size(il));
                    stretch((uint8_t *) factors(seq, il, ih), sizeof(ggml_fp16_t));
                }
                for (int64_t iw = 0; iw < n_sketch; ++iw) {
                    stretch((uint8_t *) (sketches(seq, il, ih) + iw*n_slots), sizeof(uint64_t));
                }
                stretch(k_rows(seq, il, ih), k_row_size(il));
                stretch(v_rows(seq, il, ih), v_row_size(il));
            }
        }
    }

    // of the bytes of these slots
    uint64_t checksum(int64_t seq, int64_t slot, int64_t n, bool with_sketches) const;

    void copy(int64_t seq_src, int64_t seq_dst, int64_t slot, int64_t n);

    // A file: the disk has room for the rows of slots below n, of which more are reserved than are asked for. Throws
    // std::runtime_error if it has not; a write to the mapping would end the process then.
    void reserve(int64_t seq, int64_t n);

    // Nothing that the sequence has stored is wanted any more: gives its memory back. A file stays as it is.
    void release(int64_t seq);

    // a file's rows are on the disk
    void sync() const;

private:
    class mapping; // lminf-store.cpp: POSIX or Windows

    // where everything lies, but nothing to hold it
    lminf_store(std::vector<layer_shape> layers, ggml_type type, int64_t n_slots, const std::string & path);

    uint64_t full_size(int64_t n_seqs) const;

    void check_room(uint64_t size) const;

    const std::vector<layer_shape> layers;
    const std::string              path;

    // 64 bits wide also where memory has less: it is refused only once it is counted
    std::vector<uint64_t> layer_offsets; // of head 0, from the beginning of a sequence
    uint64_t              n_bytes_seq  = 0;
    size_t                n_bytes_slot = 0;

    std::unique_ptr<mapping> map;
    uint8_t *                data = nullptr; // of sequence 0

    std::vector<int64_t> n_reserved;  // [seq] slots that the disk has room for
    std::vector<bool>    means_found; // [seq]

    static uint64_t align_words(uint64_t n) { return (n + sizeof(uint64_t) - 1)/sizeof(uint64_t)*sizeof(uint64_t); }

    size_t head_offset(int64_t seq, size_t layer, int64_t head) const {
        return seq*n_bytes_seq + layer_offsets[layer] + head*head_size(layer);
    }
    size_t mean_size(size_t layer) const { return n_words(layer) > 0 ? align_words((1 + n_embd_k(layer))*sizeof(float)) : 0; }
    size_t sketch_size(size_t layer) const {
        return n_words(layer) > 0 ? n_words(layer)*sizeof(uint64_t) + sizeof(ggml_fp16_t) : 0;
    }
    uint64_t sketches_size(size_t layer) const { return mean_size(layer) + align_words((uint64_t) n_slots*sketch_size(layer)); }
    size_t row_size(size_t layer) const { return sketch_size(layer) + k_row_size(layer) + v_row_size(layer); }
    uint64_t head_size(size_t layer) const;

    std::vector<uint8_t> make_header(uint64_t id) const;
};
