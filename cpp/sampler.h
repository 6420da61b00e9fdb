// How a token is drawn: llama.cpp's samplers in llama.cpp's order, and a grammar that the text has to follow.

#pragma once

#include "context.h"

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lminf_python {

struct sampler_options {
    uint32_t                     seed              = 0;
    float                        temperature       = 0.8f;
    int32_t                      top_k             = 40;
    float                        top_p             = 0.95f;
    float                        min_p             = 0.05f;
    float                        repeat_penalty    = 1.0f;
    float                        frequency_penalty = 0.0f;
    float                        presence_penalty  = 0.0f;
    int32_t                      penalty_last_n    = 64;
    std::map<llama_token, float> logit_bias;
    std::string                  grammar; // GBNF with a rule named root; "" for none
};

struct sampler_deleter {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

using sampler_ptr = std::unique_ptr<llama_sampler, sampler_deleter>;

using token_logprob = std::pair<llama_token, float>; // natural log, before any sampler

struct drawn_token {
    token_logprob              drawn;         // NaN if nobody asked
    std::vector<token_logprob> most_probable; // descending
};

// Several threads can use one: each token is drawn and accepted before the next.
class Sampler {
public:
    // Throws error_type::config if llama.cpp refuses the grammar.
    Sampler(std::shared_ptr<Model> model, const sampler_options & options);

    // Tokens that the penalties count although they were not drawn: the prompt's.
    void accept(const token_array & tokens);

    // Draws the token after the last one of a sequence, and looks up the n_top most probable ones; without n_top no
    // probability is computed. Throws error_type::state if the grammar allows no token of the vocabulary.
    drawn_token sample(Context & context, std::optional<size_t> n_top, llama_seq_id seq_id);

private:
    void        add(llama_sampler * sampler);
    void        take_in(llama_token token);
    llama_token draw(const float * logits);
    llama_token draw_among_candidates();
    bool        grammar_allows(llama_token token) const;
    void        remove_what_the_grammar_forbids();
    void        fill_with_all(const float * logits);
    void        fill_with_possible(const float * logits);

    const std::shared_ptr<Model> model;
    const sampler_options        options;
    sampler_ptr                  chain;
    sampler_ptr                  grammar; // NULL: none

    std::mutex                    mutex; // of all below, and of the samplers; taken without the GIL
    std::vector<llama_token_data> candidates;

    // what the penalties count
    std::deque<llama_token>                  recent;
    std::unordered_map<llama_token, int32_t> n_recent;
};

} // namespace lminf_python
