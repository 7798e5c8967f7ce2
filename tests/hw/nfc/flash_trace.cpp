// Drives one FlashChannel with the commands of a script and prints each cycle in which something moves.
// Usage: flash_trace image cycles ready_mask name=value... -- ppn...
#include <iostream>

#include "flash_model.h"

int main(int argc, char** argv) {
  kvstrata::FlashParams params;
  std::vector<uint32_t> commands;
  bool after = false;
  const kvstrata::FlashImage image(argv[1]);
  const long cycles = std::stol(argv[2]);
  const uint64_t ready_mask = std::stoull(argv[3]);
  for (int n = 4; n < argc; n++) {
    if (std::string(argv[n]) == "--") after = true;
    else if (after) commands.push_back(uint32_t(std::stoul(argv[n])));
    else if (!params.set(argv[n])) return 2;
  }
  kvstrata::FlashChannel channel(params, image);
  size_t next = 0;
  for (long now = 0; now < cycles; now++) {
    const bool ready = ready_mask >> (now % 64) & 1, commanded = next < commands.size() && channel.command_ready();
    if (channel.valid() && ready) {
      const auto beat = channel.beat();
      std::cout << now << ' ' << beat.data << ' ' << beat.first << ' ' << beat.last << ' ' << beat.fail << '\n';
    }
    channel.tick(commanded, commanded ? commands[next] : 0, ready);
    next += commanded;
  }
}
