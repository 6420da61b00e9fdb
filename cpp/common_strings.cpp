// The three functions of llama.cpp's common library that its JSON schema converter needs from common.cpp, which would
// bring downloads, argument parsing and much else with it.

#include "common.h"

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string result;
    for (const auto & value : values) {
        result += (&value == values.data() ? "" : separator) + value;
    }
    return result;
}

std::vector<std::string> string_split(const std::string & str, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t                   begin = 0;
    for (size_t end; (end = str.find(delimiter, begin)) != std::string::npos; begin = end + delimiter.size()) {
        parts.push_back(str.substr(begin, end - begin));
    }
    parts.push_back(str.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & str, size_t n) {
    std::string result;
    for (size_t i = 0; i < n; i++) {
        result += str;
    }
    return result;
}
