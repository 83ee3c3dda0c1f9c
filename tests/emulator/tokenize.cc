// Prints the ids of each line of stdin, a text in hexadecimal, by the tokenizer of a `.rkemu` file.
#include <cstdio>
#include <iostream>
#include <string>

#include "file.h"
#include "tokenizer.h"

int main(int, char** argv) {
  const auto file = rkemu::File::open(argv[1]);
  rkemu::Tokenizer tokenizer(file, std::stoul(argv[2]));
  for (std::string line; std::getline(std::cin, line);) {
    std::string text;
    for (size_t i = 0; i + 1 < line.size(); i += 2) {
      text += static_cast<char>(std::stoi(line.substr(i, 2), nullptr, 16));
    }
    for (const int32_t id : tokenizer.encode(text, true)) std::printf("%d ", id);
    std::printf("\n");
  }
}
