#include "grammar.h"

#include "errors.h"

#include <llama-grammar.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace lminf_python {

static constexpr size_t n_depth_max = 200;   // nested parentheses, for which the parser recurses
static constexpr size_t n_rules_max = 10000; // so that a chain of rules, for which llama.cpp recurses, stays short

static constexpr size_t n_message_max = 160; // bytes

static bool is_end(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// Literals and character classes may hold parentheses too: what is inside of them is skipped.
static void check_depth(const char * text) {
    size_t depth = 0;
    char   quote = 0;
    for (const char * c = text; *c; ++c) {
        if (*c == '\\' && c[1]) {
            ++c;
        } else if (quote) {
            quote = *c == quote ? 0 : quote;
        } else if (*c == '"' || *c == '[') {
            quote = *c == '"' ? '"' : ']';
        } else if (*c == '#') {
            c += std::strcspn(c, "\r\n") - 1;
        } else if (*c == '(' && ++depth > n_depth_max) {
            throw std::runtime_error("parentheses are nested more than " + std::to_string(n_depth_max) + " deep");
        } else if (*c == ')' && depth > 0) {
            --depth;
        }
    }
}

// Which rules can produce the empty text.
static std::vector<bool> find_nullable(const llama_grammar_rules & rules) {
    std::vector<bool> nullable(rules.size());
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t i = 0; i < rules.size(); ++i) {
            bool empty = true; // so far, this alternate
            for (const auto & element : rules[i]) {
                if (is_end(element)) {
                    if (empty && !nullable[i]) {
                        nullable[i] = changed = true;
                    }
                    empty = true;
                } else {
                    empty = empty && element.type == LLAMA_GRETYPE_RULE_REF && nullable[element.value];
                }
            }
        }
    }
    return nullable;
}

struct leftmost_reference {
    size_t rule;
    bool   grows; // something follows it in its alternate, which has to be kept on the stack
};

static std::vector<std::vector<leftmost_reference>> find_leftmost(const llama_grammar_rules & rules) {
    const std::vector<bool> nullable = find_nullable(rules);

    std::vector<std::vector<leftmost_reference>> result(rules.size());
    for (size_t i = 0; i < rules.size(); ++i) {
        bool at_left = true;
        for (size_t k = 0; k < rules[i].size(); ++k) {
            const auto & element = rules[i][k];
            if (is_end(element)) {
                at_left = true;
            } else if (at_left && element.type == LLAMA_GRETYPE_RULE_REF) {
                result[i].push_back({ element.value, !is_end(rules[i][k + 1]) });
                at_left = nullable[element.value];
            } else {
                at_left = false;
            }
        }
    }
    return result;
}

static bool reaches(const std::vector<std::vector<leftmost_reference>> & leftmost, size_t from, size_t to) {
    std::vector<bool>   seen(leftmost.size());
    std::vector<size_t> todo = { from };
    while (!todo.empty()) {
        const size_t rule = todo.back();
        todo.pop_back();
        if (rule == to) {
            return true;
        }
        if (!seen[rule]) {
            seen[rule] = true;
            for (const auto & reference : leftmost[rule]) {
                todo.push_back(reference.rule);
            }
        }
    }
    return false;
}

static std::string rule_name(const llama_grammar_parser & parser, size_t rule) {
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id == rule) {
            return name;
        }
    }
    return std::to_string(rule);
}

static void check_references(const llama_grammar_parser & parser) {
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            throw std::runtime_error("rule " + name + " is not defined");
        }
    }
}

static void check_left_recursion(const llama_grammar_parser & parser) {
    const auto leftmost = find_leftmost(parser.rules);
    for (size_t i = 0; i < leftmost.size(); ++i) {
        for (const auto & reference : leftmost[i]) {
            if (reference.grows && reaches(leftmost, reference.rule, i)) {
                throw std::runtime_error("rule " + rule_name(parser, i) + " is left-recursive");
            }
        }
    }
}

static void check(const llama_vocab * vocab, const char * grammar) {
    check_depth(grammar);
    llama_grammar_parser parser(vocab);
    // a first rule's head may follow comments and blank lines, which only parse() skips
    const char * pos = grammar;
    for (size_t n = std::strspn(pos, " \t\r\n"); n > 0 || *pos == '#'; n = std::strspn(pos, " \t\r\n")) {
        pos += n;
        pos += *pos == '#' ? std::strcspn(pos, "\r\n") : 0;
    }
    while (*pos) {
        pos = parser.parse_rule(pos);
        if (parser.symbol_ids.size() > n_rules_max) {
            throw std::runtime_error("it has more than " + std::to_string(n_rules_max) + " rules");
        }
    }
    if (!parser.symbol_ids.count("root")) {
        throw std::runtime_error("there is no rule root");
    }
    check_references(parser);
    check_left_recursion(parser);
}

// The parser's messages quote all the rest of the grammar: the beginning of one, in whole characters of UTF-8.
static std::string shortened(const std::string & message) {
    size_t n = std::min(message.size(), n_message_max);
    while (n > 0 && n < message.size() && (message[n] & 0xC0) == 0x80) {
        --n;
    }
    return message.substr(0, n);
}

void check_grammar(const llama_vocab * vocab, const std::string & text) {
    try {
        check(vocab, text.c_str());
    } catch (const std::exception & err) {
        throw error(error_type::config, "grammar: " + shortened(err.what()));
    }
}

} // namespace lminf_python
