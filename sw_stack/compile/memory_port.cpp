// One master's view of some memory channels: docstrings and units are those of MemoryPort in memory.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {
struct Timing {
    double interval, latency[2];  // [read, write], as are the arrays below
    double period, blocked, drain, column[2];  // period 0: no refresh; column: from a column to its beat or answer
    double turn[2];  // from the end of a transfer of this kind to the start of one of the other; below 0: none
};

struct Transfer {
    int64_t at;
    int32_t beats, first, last, write;
};

struct Free {
    std::vector<double> next[2];  // per channel: the earliest next beat read and answer of a write
};

class Port {
public:
    Port(const Timing& timing, const double* due, int channels, const Port* others)
        : timing_(timing), due_(due, due + channels), free_(1) {
        for (auto& next : free_[0].next) next.assign(channels, 0.0);
        if (others) all_ = others->own_;
        std::stable_sort(all_.begin(), all_.end(), [](auto& a, auto& b) { return a.at < b.at; });
    }

    // Calls need not be in the order of `at`: what comes behind is served again.
    void add(const Transfer& transfer, int64_t* answered) {
        auto later = [](int64_t at, const Transfer& other) { return at < other.at; };
        size_t place = std::upper_bound(all_.begin(), all_.end(), transfer.at, later) - all_.begin();
        known_ = std::min(known_, place);
        for (; known_ < place; known_++) serve(known_, all_[known_]);
        own_.push_back(transfer);
        all_.insert(all_.begin() + place, transfer);
        serve(known_++, transfer);
        for (int32_t n = 0; n < transfer.beats; n++) answered[n] = int64_t(std::ceil(times_[n]));
    }

private:
    // Leaves the cycle of each beat, of the latest channel, in times_, and what is free behind it in free_.
    void serve(size_t place, const Transfer& t) {
        if (free_.size() <= place + 1) free_.resize(place + 2);
        free_[place + 1] = free_[place];
        auto& own = free_[place + 1].next[t.write];
        auto& other = free_[place + 1].next[!t.write];
        bool refreshed = false;
        starts_.resize(own.size());
        for (int c = t.first; c < t.last; c++) {
            starts_[c] = start(std::max(own[c], t.at + timing_.latency[t.write]), own[c], c, t.write);
            refreshed |= starts_[c].first + (t.beats - 1) * timing_.interval >= starts_[c].second;
        }
        times_.assign(t.beats, 0.0);
        for (int c = t.first; c < t.last; c++) {
            own[c] = refreshed ? transfer_across(t, c) : transfer(t, c);
            if (timing_.turn[0] >= 0) other[c] = own[c] - timing_.interval + timing_.turn[t.write];
        }
    }

    // First beat, not while a refresh is on, and the column limit of the refresh behind it.
    std::pair<double, double> start(double start, double free, int channel, int write) const {
        if (!timing_.period) return {start, INFINITY};
        double due = due_[channel] + timing_.column[write];
        double passed = std::floor((start - due) / timing_.period);
        if (passed < 0) return {start, due};
        double latest = due + passed * timing_.period, before = free - timing_.interval;
        double opens = before < latest ? std::max(latest, before + timing_.drain) : latest;
        return {std::max(start, opens + timing_.blocked), latest + timing_.period};
    }

    double transfer(const Transfer& t, int c) {
        for (int32_t n = 0; n < t.beats; n++) times_[n] = std::max(times_[n], starts_[c].first + n * timing_.interval);
        return starts_[c].first + t.beats * timing_.interval;
    }

    // Some channel's refresh falls between the beats: those behind it wait for its end.
    double transfer_across(const Transfer& t, int c) {
        auto [start, coming] = starts_[c];
        double fit = std::ceil((coming - start) / timing_.interval);
        double opens = std::max(coming, start + (fit - 1) * timing_.interval + timing_.drain);
        double jump = std::max(0.0, opens + timing_.blocked - start - fit * timing_.interval), time = start;
        for (int32_t n = 0; n < t.beats; n++) {
            time = start + n * timing_.interval + (n >= fit ? jump : 0.0);
            times_[n] = std::max(times_[n], time);
        }
        return time + timing_.interval;
    }

    Timing timing_;
    std::vector<double> due_;
    std::vector<Transfer> own_, all_;
    std::vector<Free> free_;  // before each of all_, as far as known_
    size_t known_ = 0;
    std::vector<std::pair<double, double>> starts_;
    std::vector<double> times_;
};
}  // namespace

extern "C" {
void* kv_port_new(const Timing* timing, const double* due, int channels, const Port* others) {
    return new Port(*timing, due, channels, others);
}
void kv_port_delete(Port* port) { delete port; }
void kv_port_add(Port* port, int64_t at, int32_t beats, int32_t first, int32_t last, int32_t write, int64_t* answered) {
    port->add({at, beats, first, last, write}, answered);
}
}
