// Drives one FlashChannel with the commands and grants of a script and prints every beat.
// Usage: flash_trace image cycles name=value... -- ppn,kernel... -- cycle,kernel,slot...
#include <cstdio>
#include <iostream>

#include "flash_model.h"

int main(int argc, char** argv) {
  kvstrata::FlashParams params;
  struct Command { uint32_t ppn; unsigned kernel; };
  struct Grant { long cycle; unsigned kernel, slot; };
  std::vector<Command> commands;
  std::vector<Grant> grants;
  int part = 0;
  const kvstrata::FlashImage image(argv[1]);
  const long cycles = std::stol(argv[2]);
  for (int n = 3; n < argc; n++) {
    Command command;
    Grant grant;
    if (std::string(argv[n]) == "--") part++;
    else if (part == 1 && std::sscanf(argv[n], "%u,%u", &command.ppn, &command.kernel) == 2) commands.push_back(command);
    else if (part == 2 && std::sscanf(argv[n], "%ld,%u,%u", &grant.cycle, &grant.kernel, &grant.slot) == 3) grants.push_back(grant);
    else if (part || !params.set(argv[n])) return 2;
  }
  kvstrata::FlashChannel channel(params, image);
  size_t next = 0, given = 0;
  for (long now = 0; now < cycles; now++) {
    const bool commanded = next < commands.size() && channel.command_ready();
    if (channel.valid()) {
      const auto beat = channel.beat();
      std::cout << now << ' ' << beat.data << ' ' << beat.first << ' ' << beat.last << ' ' << beat.fail << ' ' << beat.slot
                << ' ' << beat.kernel << '\n';
    }
    for (; given < grants.size() && grants[given].cycle == now; given++) channel.grant(grants[given].kernel, grants[given].slot);
    const Command command = commanded ? commands[next] : Command{0, 0};
    channel.tick(commanded, command.ppn, command.kernel);
    next += commanded;
  }
}
