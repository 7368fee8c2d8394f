// Several ops in one call, from a program of one line each:
//
//   rms_norm %0 %1 1e-05
//   quant_linear %5 %2 %3 %4 - 8 0 8
//   return %6
//
// %n is number n of the tensors, then of the results in order; - is None. Beside the ops there are `add a b`, `heads a
// d`, which sees (batch, 1, heads d) as (batch, heads, 1, d), `flat a`, which sees (batch, 1, heads, d) as (batch, 1,
// heads d), and `place a b`, without a result, which makes (batch, heads, 1, d) the last of (batch, heads, n, d). A
// program is read once and kept.
#include <charconv>
#include <cstring>
#include <memory>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "../common/linear.h"

namespace tinycomp {
namespace {

using Slots = std::vector<std::optional<Tensor>>;

constexpr int64_t kNone = -1;

struct Argument {
  enum class Kind { tensor, maybe, integer, real, text } kind;
  int64_t number;  // of a slot, or the integer
  double real;
  std::string text;
};

struct Instruction {
  std::string name;
  const BoxedKernel* kernel;  // null: one of the three below
  std::vector<Argument> arguments;
};

struct Program {
  int64_t inputs = 0, slots = 0;
  std::vector<Instruction> instructions;
  std::vector<int64_t> outputs;
};

[[noreturn]] void refuse(const std::string& line, const std::string& why) {
  throw std::runtime_error("sequence: '" + line + "': " + why);
}

template <class N>
N number(const std::string& line, const std::string& token) {
  N value{};
  const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
  if (error != std::errc() || end != token.data() + token.size()) refuse(line, "'" + token + "' is no number");
  return value;
}

int64_t slot(const std::string& line, const std::string& token, int64_t slots) {
  if (token.size() < 2 || token[0] != '%') refuse(line, "'" + token + "' names no tensor");
  const auto found = number<int64_t>(line, token.substr(1));
  if (found < 0 || found >= slots) refuse(line, "'" + token + "' is not there yet");
  return found;
}

Argument read_argument(const std::string& line, const std::string& type, const std::string& token, int64_t slots) {
  using Kind = Argument::Kind;
  if (type == "Tensor") return {Kind::tensor, slot(line, token, slots), 0, ""};
  if (type == "Optional[Tensor]") return {Kind::maybe, token == "-" ? kNone : slot(line, token, slots), 0, ""};
  if (type == "int") return {Kind::integer, number<int64_t>(line, token), 0, ""};
  if (type == "float") return {Kind::real, 0, number<double>(line, token), ""};
  if (type == "str") return {Kind::text, 0, 0, token};
  refuse(line, "an argument of type " + type + " cannot be written");
}

const std::vector<std::string>* own_arguments(const std::string& name) {
  static const std::map<std::string, std::vector<std::string>> all = {{"add", {"Tensor", "Tensor"}},
                                                                      {"heads", {"Tensor", "int"}},
                                                                      {"flat", {"Tensor"}},
                                                                      {"place", {"Tensor", "Tensor"}}};
  const auto found = all.find(name);
  return found == all.end() ? nullptr : &found->second;
}

Program read(const std::string& text, int64_t inputs) {
  Program program;
  program.inputs = program.slots = inputs;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::vector<std::string> tokens;
    std::string name;
    words >> name;
    for (std::string token; words >> token;) tokens.push_back(token);
    if (name == "return") {
      for (const auto& token : tokens) program.outputs.push_back(slot(line, token, program.slots));
      continue;
    }
    const auto kernel = kernels().find(name);
    const auto* types = kernel == kernels().end() ? own_arguments(name) : &kernel->second.arguments;
    if (types == nullptr) refuse(line, "there is no such op");
    if (types->size() != tokens.size()) refuse(line, "it takes " + std::to_string(types->size()) + " arguments");
    Instruction instruction{name, kernel == kernels().end() ? nullptr : &kernel->second, {}};
    for (size_t i = 0; i < tokens.size(); ++i)
      instruction.arguments.push_back(read_argument(line, (*types)[i], tokens[i], program.slots));
    program.slots +=
        instruction.kernel != nullptr ? static_cast<int64_t>(instruction.kernel->results) : name != "place";
    program.instructions.push_back(std::move(instruction));
  }
  return program;
}

std::shared_ptr<const Program> program_of(const std::string& text, int64_t inputs) {
  constexpr size_t kMost = 4096;
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Program>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& found = known[text];
  if (found == nullptr || found->inputs != inputs) {
    if (known.size() > kMost) known.clear();
    return known[text] = std::make_shared<const Program>(read(text, inputs));
  }
  return found;
}

Tensor seen_as(const Tensor& x, const std::vector<int64_t>& shape) {
  const Tensor from = adjacent(x);
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= std::max<int64_t>(shape[d], 1)) strides[d] = step;
  int64_t offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(from.get(), &offset));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(from.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                        strides.data(), offset, &made));
  return Tensor(made);
}

Tensor heads(const Tensor& x, int64_t d) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == 1 && d > 0 && x.size(2) % d == 0, "sequence: heads do not fit");
  return seen_as(x, {x.size(0), x.size(2) / d, 1, d});
}

Tensor flat(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == 1, "sequence: flat does not fit");
  return seen_as(x, {x.size(0), 1, x.size(2) * x.size(3)});
}

Tensor add(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() >= 1 && a.dim() == b.dim() && a.scalar_type() == b.scalar_type(),
                  "sequence: add does not fit");
  for (int64_t d = 0; d < a.dim(); ++d) STD_TORCH_CHECK(a.size(d) == b.size(d), "sequence: add does not fit");
  return with_float_type(a.scalar_type(), "sequence: add", [&](auto zero) {
    using T = decltype(zero);
    const Tensor left = adjacent(a), right = adjacent(b),
                 y = empty(shape_with_last(a, a.size(a.dim() - 1)), scalar_type<T>);
    const T *from = static_cast<const T*>(left.const_data_ptr()),
            *other = static_cast<const T*>(right.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    const int64_t n = a.numel();
    for (int64_t i = 0; i < n; ++i)
      to[i] = static_cast<T>(static_cast<Accumulate<T>>(from[i]) + static_cast<Accumulate<T>>(other[i]));
    return y;
  });
}

void place(const Tensor& x, const Tensor& into) {
  STD_TORCH_CHECK(x.dim() == 4 && into.dim() == 4 && x.size(2) == 1 && into.size(2) > 0 && x.size(0) == into.size(0) &&
                      x.size(1) == into.size(1) && x.size(3) == into.size(3) && x.scalar_type() == into.scalar_type() &&
                      (into.stride(3) == 1 || into.size(3) < 2),
                  "sequence: place does not fit");
  const Tensor from = adjacent(x);
  const int64_t size = static_cast<int64_t>(x.element_size()), line = x.size(3) * size;
  const char* read = static_cast<const char*>(from.const_data_ptr());
  char* const last = static_cast<char*>(into.mutable_data_ptr()) + (into.size(2) - 1) * into.stride(2) * size;
  for (int64_t b = 0; b < x.size(0); ++b)
    for (int64_t h = 0; h < x.size(1) && line > 0; ++h, read += line)
      std::memcpy(last + (b * into.stride(0) + h * into.stride(1)) * size, read, line);
}

void run(const Instruction& instruction, Slots& slots) {
  using torch::stable::detail::from;
  using Kind = Argument::Kind;
  const auto& arguments = instruction.arguments;
  const auto given = [&](const Argument& a) -> const Tensor& {
    STD_TORCH_CHECK(slots[a.number].has_value(), "sequence: ", instruction.name, " got None for a tensor");
    return *slots[a.number];
  };
  for (const auto& a : arguments)
    if (a.kind == Kind::tensor) given(a);
  if (instruction.kernel == nullptr) {
    const Tensor& x = given(arguments[0]);
    if (instruction.name == "place") return place(x, given(arguments[1]));
    slots.emplace_back(instruction.name == "add"     ? add(x, given(arguments[1]))
                       : instruction.name == "heads" ? heads(x, arguments[1].number)
                                                     : flat(x));
    return;
  }
  std::vector<StableIValue> stack;
  stack.reserve(std::max<size_t>(arguments.size(), instruction.kernel->results));
  for (const auto& a : arguments) switch (a.kind) {
      case Kind::tensor:
        stack.push_back(from(*slots[a.number]));
        break;
      case Kind::maybe:
        stack.push_back(from(a.number == kNone ? std::optional<Tensor>() : slots[a.number]));
        break;
      case Kind::integer:
        stack.push_back(from(a.number));
        break;
      case Kind::real:
        stack.push_back(from(a.real));
        break;
      case Kind::text:
        stack.push_back(from(a.text));
        break;
    }
  stack.resize(std::max<size_t>(arguments.size(), instruction.kernel->results));
  instruction.kernel->run(stack.data(), arguments.size(), instruction.kernel->results);
  for (uint64_t i = 0; i < instruction.kernel->results; ++i)
    slots.emplace_back(torch::stable::detail::to<Tensor>(stack[i]));
}

std::vector<Tensor> sequence(std::vector<std::optional<Tensor>> tensors, std::string text) {
  const auto program = program_of(text, static_cast<int64_t>(tensors.size()));
  Slots slots = std::move(tensors);
  slots.reserve(program->slots);
  for (const auto& instruction : program->instructions) run(instruction, slots);
  std::vector<Tensor> outputs;
  for (const int64_t i : program->outputs) {
    STD_TORCH_CHECK(slots[i].has_value(), "sequence: a result is None");
    outputs.push_back(*slots[i]);
  }
  return outputs;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tinycomp, m) { m.def("sequence(Tensor?[] tensors, str program) -> Tensor[]"); }
STABLE_TORCH_LIBRARY_IMPL(tinycomp, CPU, m) { m.impl("sequence", TORCH_BOX(&sequence)); }

}  // namespace
}  // namespace tinycomp
