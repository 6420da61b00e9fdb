#include "sampler.h"

#include "errors.h"
#include "grammar.h"
#include "log.h"
#include "logprob.h"

#include <algorithm>
#include <cmath>

namespace lminf_python {

// Below this, logits divided by the temperature could overflow; the result is the most probable token anyway.
static constexpr float greedy_temperature = 1e-6f;

static sampler_ptr make_grammar(const Model & model, const std::string & text) {
    check_grammar(model.vocab, text);
    const log_scope scope(model.verbose);
    sampler_ptr     grammar(llama_sampler_init_grammar(model.vocab, text.c_str(), "root"));
    if (!grammar) {
        throw error(error_type::config, scope.explain("grammar: llama.cpp refused it"));
    }
    return grammar;
}

static bool is_greedy(const sampler_options & options) {
    return options.temperature < greedy_temperature;
}

static bool has_penalties(const sampler_options & options) {
    return options.penalty_last_n > 0 &&
        (options.repeat_penalty != 1.0f || options.frequency_penalty != 0.0f || options.presence_penalty != 0.0f);
}

Sampler::Sampler(std::shared_ptr<Model> model, const sampler_options & options) :
    model(std::move(model)),
    options(options),
    chain(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
    const int32_t n_vocab = this->model->n_vocab();

    for (const auto & [token, _] : options.logit_bias) {
        this->model->check_tokens(&token, 1);
    }
    add(llama_sampler_init_penalties(
        n_vocab, options.penalty_last_n, options.repeat_penalty, options.frequency_penalty, options.presence_penalty));
    if (is_greedy(options)) {
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
    const llama_token * begin = tokens.data();
    const llama_token * end   = begin + tokens.size();

    const pybind11::gil_scoped_release released;
    const std::lock_guard              lock(mutex);
    std::for_each(begin, end, [this](llama_token token) { take_in(token); });
}

// Counts as the chain's penalties do.
void Sampler::take_in(llama_token token) {
    llama_sampler_accept(chain.get(), token);
    if (!has_penalties(options)) {
        return;
    }
    recent.push_back(token);
    n_recent[token]++;
    if (recent.size() > static_cast<size_t>(options.penalty_last_n)) {
        const auto oldest = n_recent.find(recent.front());
        if (--oldest->second == 0) {
            n_recent.erase(oldest);
        }
        recent.pop_front();
    }
}

drawn_token Sampler::sample(Context & context, std::optional<size_t> n_top, llama_seq_id seq_id) {
    if (context.model != model) {
        throw error(error_type::config, "the sampler was made for another model");
    }
    const Context::use    held(context, seq_id, Context::ahead_tokens::keep);
    const std::lock_guard lock(mutex);
    const float *         logits  = held.last_logits();
    const llama_token     token   = draw(logits);
    const int32_t         n_vocab = model->n_vocab();
    take_in(token);
    try {
        llama_sampler_accept(grammar.get(), token);
    } catch (const std::exception & err) { // where it mixes tokens and characters, it can allow more than it accepts
        throw error(error_type::state, std::string("the grammar contradicts itself: ") + err.what());
    }
    if (!n_top) {
        return {{token, NAN}, {}};
    }
    const double sum     = log_sum_exp(logits, n_vocab);
    const auto   logprob = [&](llama_token one) { return token_logprob(one, static_cast<float>(logits[one] - sum)); };
    drawn_token  result  = {logprob(token), {}};
    for (const llama_token one : largest(logits, n_vocab, *n_top)) {
        result.most_probable.push_back(logprob(one));
    }
    return result;
}

// Asking the grammar about every token of the vocabulary is slow, so it is asked about one first. Drawing again among
// the allowed tokens only when that one is forbidden leaves the proportions of the allowed ones as they are.
llama_token Sampler::draw(const float * logits) {
    fill_with_possible(logits);
    const llama_token token = draw_among_candidates();
    if (!grammar || grammar_allows(token)) {
        return token;
    }
    fill_with_all(logits);
    remove_what_the_grammar_forbids();
    if (candidates.empty()) {
        throw error(error_type::state, "the grammar allows no token of the vocabulary here");
    }
    return draw_among_candidates();
}

void Sampler::fill_with_all(const float * logits) {
    candidates.clear();
    for (llama_token token = 0; token < model->n_vocab(); token++) {
        candidates.push_back({token, logits[token], 0.0f});
    }
    for (const auto & [token, value] : options.logit_bias) {
        candidates[token].logit += value;
    }
}

// Most of the vocabulary cannot be drawn where the chain keeps k tokens only: no more than the k largest of those logits
// that neither bias nor penalties change, and those that they do.
void Sampler::fill_with_possible(const float * logits) {
    const auto   n_vocab   = static_cast<size_t>(model->n_vocab());
    const size_t n_kept    = is_greedy(options) ? 1 : static_cast<size_t>(std::max(options.top_k, 0));
    const size_t n_changed = n_recent.size() + options.logit_bias.size();
    const bool   is_few    = n_kept > 0 && n_kept + n_changed < n_vocab / 8;

    std::vector<llama_token> tokens = largest(logits, model->n_vocab(), is_few ? n_kept + n_changed : 0);
    if (!is_few || tokens.size() < n_kept + n_changed) { // the latter where nearly all are impossible
        fill_with_all(logits);
        return;
    }
    for (const auto & [token, _] : n_recent) {
        tokens.push_back(token);
    }
    for (const auto & [token, _] : options.logit_bias) {
        tokens.push_back(token);
    }
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());

    candidates.clear();
    for (const llama_token token : tokens) {
        const auto bias = options.logit_bias.find(token);
        candidates.push_back({token, logits[token] + (bias == options.logit_bias.end() ? 0.0f : bias->second), 0.0f});
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
