// Decodes one prompt with an exported step, without Python:  decode ARTIFACT NEW_TOKENS TOKEN_ID...
// Prints the token ids, prompt included. The other rows of the batch stay idle.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

int main(int argc, char** argv) {
  if (argc < 4) return std::cerr << "usage: decode ARTIFACT NEW_TOKENS TOKEN_ID...\n", 2;
  const std::string folder = argv[1];
  std::vector<int64_t> prompt;
  for (int i = 3; i < argc; ++i) prompt.push_back(std::stoll(argv[i]));
  // The ops of emssd_compile; the package calls them.
  if (!dlopen((folder + "/libemssd_ops.so").c_str(), RTLD_NOW)) return std::cerr << dlerror() << "\n", 1;
  torch::inductor::AOTIModelPackageLoader step(folder + "/step.pt2");

  // All state is in tensors: zeros at first, caches included, but for options; what a step returns replaces its input.
  const std::map<std::string, at::ScalarType> dtypes = {{"int64", at::kLong}, {"bool", at::kBool},
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}};
  std::map<std::string, at::Tensor> tensors;
  std::vector<std::string> inputs, outputs;
  std::ifstream bindings(folder + "/bindings.txt");
  for (std::string line, kind, name, dtype, size; std::getline(bindings, line);) {
    std::istringstream words(line);
    double first;
    words >> kind >> name >> dtype >> first;
    (kind == "input" ? inputs : outputs).push_back(name);
    std::vector<int64_t> shape;
    while (words >> size) shape.push_back(size == "*" ? 0 : std::stoll(size));
    if (kind == "input") tensors[name] = at::full(shape, first, dtypes.at(dtype));
  }
  const int64_t most = tensors["draft_tokens"].size(1), length = prompt.size();
  tensors["history"][0].narrow(0, 0, length).copy_(at::tensor(prompt));
  tensors["known"][0] = length;
  tensors["limits"][0] = length + std::stoll(argv[2]);
  tensors["active"][0] = true;
  tensors["draft_budget"].fill_(most);
  tensors["step_seconds"].fill_(1);  // no times are known

  const auto read = [&](const char* name) { return tensors[name][0].item<int64_t>(); };
  while (read("active")) {
    const int64_t pending = read("known") - read("lengths"), drafts = read("draft_lengths");
    tensors["token_range"] = at::arange(pending + drafts);  // the sizes of a step are lengths of inputs
    tensors["logit_range"] = at::arange(1 + drafts);
    tensors["draft_range"] = at::arange(pending + 1);
    tensors["row_range"] = at::arange(pending + drafts);
    std::vector<at::Tensor> values;
    for (const auto& name : inputs) values.push_back(tensors[name]);
    const auto results = step.run(values);
    for (size_t i = 0; i < outputs.size(); ++i) tensors[outputs[i]] = results[i];
  }
  for (int64_t i = 0; i < read("known"); ++i) std::cout << tensors["history"][0][i].item<int64_t>() << " ";
  std::cout << std::endl;
}
