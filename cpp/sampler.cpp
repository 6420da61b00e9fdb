#include "sampler.h"

#include "errors.h"
#include "log.h"
#include "logprob.h"

#include <cmath>
#include <numeric>

namespace lminf_python {

// Below this, logits divided by the temperature could overflow; the result is the most probable token anyway.
static constexpr float greedy_temperature = 1e-6f;

static sampler_ptr make_grammar(const Model & model, const std::string & text) {
    char reason[160] = "";
    if (!lminf_check_grammar(model.ptr.get(), text.c_str(), "root", reason, sizeof(reason))) {
        throw error(error_type::config, "grammar: " + std::string(reason));
    }
    const log_scope scope(model.verbose);
    sampler_ptr     grammar(llama_sampler_init_grammar(model.vocab, text.c_str(), "root"));
    if (!grammar) {
        throw error(error_type::config, scope.explain("grammar: llama.cpp refused it"));
    }
    return grammar;
}

Sampler::Sampler(std::shared_ptr<Model> model, const sampler_options & options) :
    model(std::move(model)),
    chain(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
    const int32_t n_vocab = this->model->n_vocab();

    std::vector<llama_logit_bias> bias;
    for (const auto & [token, value] : options.logit_bias) {
        this->model->check_tokens(&token, 1);
        bias.push_back({token, value});
    }
    if (!bias.empty()) {
        add(llama_sampler_init_logit_bias(n_vocab, static_cast<int32_t>(bias.size()), bias.data()));
    }
    add(llama_sampler_init_penalties(
        n_vocab, options.penalty_last_n, options.repeat_penalty, options.frequency_penalty, options.presence_penalty));
    if (options.temperature < greedy_temperature) {
        add(llama_sampler_init_greedy());
    } else {
        add(llama_sampler_init_top_k(options.top_k));
        add(llama_sampler_init_top_p(options.top_p, 1));
        add(llama_sampler_init_min_p(options.min_p, 1));
        add(llama_sampler_init_temp(options.temperature));
        add(llama_sampler_init_dist(options.seed));
    }
    if (!options.grammar.empty()) {
        grammar = make_grammar(*this->model, options.grammar);
    }
}

void Sampler::add(llama_sampler * sampler) {
    if (!sampler) {
        throw error(error_type::config, "llama.cpp refused the sampling options");
    }
    llama_sampler_chain_add(chain.get(), sampler);
}

void Sampler::accept(const token_array & tokens) {
    model->check_tokens(tokens.data(), tokens.size());
    for (pybind11::ssize_t i = 0; i < tokens.size(); i++) {
        llama_sampler_accept(chain.get(), tokens.data()[i]);
    }
}

static std::vector<token_logprob> most_probable(const float * logits, int32_t n_vocab, size_t n_top) {
    std::vector<llama_token> tokens(n_vocab);
    std::iota(tokens.begin(), tokens.end(), 0);
    const auto middle = tokens.begin() + static_cast<std::ptrdiff_t>(std::min<size_t>(n_top, tokens.size()));
    std::partial_sort(
        tokens.begin(), middle, tokens.end(), [&](llama_token a, llama_token b) { return logits[a] > logits[b]; });

    std::vector<token_logprob> result;
    for (auto it = tokens.begin(); it != middle; ++it) {
        result.emplace_back(*it, logprob(logits, n_vocab, *it));
    }
    return result;
}

drawn_token Sampler::sample(Context & context, size_t n_top, llama_seq_id seq_id) {
    if (context.model != model) {
        throw error(error_type::config, "the sampler was made for another model");
    }
    const Context::use held(context, seq_id);
    const float *      logits  = held.last_logits();
    const int32_t      n_vocab = model->n_vocab();
    // llama.cpp aborts the process when no token can be drawn
    for (int32_t i = 0; i < n_vocab; i++) {
        if (std::isnan(logits[i])) {
            throw error(error_type::context, "the model computed logits that are not numbers");
        }
    }
    const llama_token token = draw(logits);
    llama_sampler_accept(chain.get(), token);
    try {
        llama_sampler_accept(grammar.get(), token);
    } catch (const std::exception & err) { // where it mixes tokens and characters, it can allow more than it accepts
        throw error(error_type::state, std::string("the grammar contradicts itself: ") + err.what());
    }
    return {{token, logprob(logits, n_vocab, token)}, most_probable(logits, n_vocab, n_top)};
}

// Asking the grammar about every token of the vocabulary is slow, so it is asked about one first. Drawing again among
// the allowed tokens only when that one is forbidden leaves the proportions of the allowed ones as they are.
llama_token Sampler::draw(const float * logits) {
    fill_candidates(logits);
    const llama_token token = draw_among_candidates();
    if (!grammar || grammar_allows(token)) {
        return token;
    }
    fill_candidates(logits);
    remove_what_the_grammar_forbids();
    if (candidates.empty()) {
        throw error(error_type::state, "the grammar allows no token of the vocabulary here");
    }
    return draw_among_candidates();
}

void Sampler::fill_candidates(const float * logits) {
    candidates.clear();
    for (llama_token token = 0; token < model->n_vocab(); token++) {
        candidates.push_back({token, logits[token], 0.0f});
    }
}

llama_token Sampler::draw_among_candidates() {
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(chain.get(), &array);
    if (array.selected < 0 || static_cast<size_t>(array.selected) >= array.size) {
        throw error(error_type::context, "llama.cpp could not draw a token");
    }
    return array.data[array.selected].id;
}

bool Sampler::grammar_allows(llama_token token) const {
    llama_token_data       one   = {token, 1.0f, 0.0f};
    llama_token_data_array array = {&one, 1, -1, false};
    llama_sampler_apply(grammar.get(), &array);
    return one.logit != -INFINITY;
}

void Sampler::remove_what_the_grammar_forbids() {
    llama_token_data_array array = {candidates.data(), candidates.size(), -1, false};
    llama_sampler_apply(grammar.get(), &array);
    const auto forbidden = [](const llama_token_data & candidate) { return candidate.logit == -INFINITY; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), forbidden), candidates.end());
}

} // namespace lminf_python
