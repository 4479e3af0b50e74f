#include "control_flow.h"

#include <algorithm>

#include "error.h"

namespace sim {
namespace {

bool ends_lanes(const ptx::Instruction& i) { return i.opcode == "exit" || i.opcode == "trap"; }

int last_return(const ptx::Function& f) {
  for (int i = static_cast<int>(f.body.size()) - 1; i >= 0; --i) {
    if (f.body[i].opcode == "ret") return i;
  }
  return -1;
}

std::vector<int> successors(const ptx::Function& f, int at, int final_return) {
  const ptx::Instruction& i = f.body[at];
  std::vector<int> next;
  const auto label = [&](const std::string& name) {
    const auto found = f.labels.find(name);
    if (found == f.labels.end()) fault(Kind::kUnsupported, -1, "label ", name, " is not known");
    next.push_back(found->second);
  };
  const int end = static_cast<int>(f.body.size());
  if (i.opcode == "bra") {
    label(i.operands[0].name);
  } else if (i.opcode == "brx") {
    for (const std::string& name : f.tables.at(i.operands[1].name)) label(name);
    return next;
  } else if (i.opcode == "ret") {
    if (!f.is_entry || at == final_return) next.push_back(end);
  } else if (!ends_lanes(i)) {
    next.push_back(at + 1);
    return next;
  }
  if (!i.guard.empty()) next.push_back(at + 1);
  return next;
}

}  // namespace

std::vector<int> reconvergence(const ptx::Function& f) {
  const int end = static_cast<int>(f.body.size());
  const int final_return = last_return(f);
  std::vector<std::vector<int>> next(end + 1), previous(end + 1);
  for (int at = 0; at < end; ++at) {
    next[at] = successors(f, at, final_return);
    for (int to : next[at]) previous[to].push_back(at);
  }
  // Post-order of the reversed graph from the end; then Cooper, Harvey & Kennedy 2001.
  std::vector<int> order, number(end + 1, -1), stack = {end};
  std::vector<size_t> child(end + 1, 0);
  std::vector<bool> seen(end + 1, false);
  seen[end] = true;
  while (!stack.empty()) {
    const int at = stack.back();
    if (child[at] < previous[at].size()) {
      const int to = previous[at][child[at]++];
      if (!seen[to]) {
        seen[to] = true;
        stack.push_back(to);
      }
    } else {
      number[at] = static_cast<int>(order.size());
      order.push_back(at);
      stack.pop_back();
    }
  }
  std::vector<int> dominator(end + 1, -1);
  dominator[end] = end;
  const auto meet = [&](int a, int b) {
    while (a != b) {
      while (number[a] < number[b]) a = dominator[a];
      while (number[b] < number[a]) b = dominator[b];
    }
    return a;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (auto at = order.rbegin() + 1; at < order.rend(); ++at) {
      int common = -1;
      for (int to : next[*at]) {
        if (dominator[to] < 0) continue;
        common = common < 0 ? to : meet(common, to);
      }
      if (common != dominator[*at]) {
        dominator[*at] = common;
        changed = true;
      }
    }
  }
  std::vector<int> result(end, -1);
  for (int at = 0; at < end; ++at) {
    if (next[at].size() > 1) result[at] = dominator[at];
  }
  return result;
}

}  // namespace sim
