// The bare array with new operands in every cycle: sim <cycles>. Operands are drawn beforehand, so that drawing costs nothing.
#include "Vbare.h"
#include "verilated.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: sim cycles\n"), 2;
    const long cycles = std::atol(argv[1]);
    VerilatedContext context;
    Vbare top(&context);
    constexpr size_t kSets = 64, kWords = (sizeof top.a + sizeof top.w) / 4;
    std::vector<uint32_t> operands(kSets * kWords);
    std::mt19937 random(1);
    for (auto& word : operands) word = random();
    top.rst = 0;
    uint32_t sum = 0;
    for (long cycle = 0; cycle < cycles; cycle++) {
        const uint32_t* set = &operands[cycle % kSets * kWords];
        top.clk = 0;
        top.eval();
        std::memcpy(&top.a, set, sizeof top.a);
        std::memcpy(&top.w, set + sizeof top.a / 4, sizeof top.w);
        top.clk = 1;
        top.eval();
        sum += top.y[cycle % 16];
    }
    std::printf("%u\n", sum);
}
