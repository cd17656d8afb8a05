// The only file that includes pybind11. Every function checks its arrays, takes spans, then
// releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "pe_infer/plane.h"
#include "pe_infer/resample.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename T>
std::span<T> mutable_view(Array<T>& array) {
  return {array.mutable_data(),
          static_cast<std::size_t>(array.size())};  // throws if the array is read-only
}

template <typename Stored>
void resample(pe_infer::SliceResampler& self, const Array<Stored>& pixels, float slope,
              float intercept, std::int32_t padding_low, std::int32_t padding_high,
              Array<std::int16_t>& out) {
  const auto source = view(pixels);
  const auto target = mutable_view(out);
  const pe_infer::Rescale rescale{slope, intercept, padding_low, padding_high};
  py::gil_scoped_release release;
  self.run(source, rescale, target);
}

// How one axis is resampled, for kernels that run elsewhere: the members of AxisWeights.
py::tuple axis_weights(int in_size, double in_spacing, int out_size, double out_spacing) {
  const pe_infer::AxisWeights axis(in_size, in_spacing, out_size, out_spacing);
  Array<std::int32_t> start(out_size);
  Array<float> weight({axis.taps(), out_size});
  std::copy_n(axis.starts(), start.size(), start.mutable_data());
  std::copy_n(axis.weights(0), weight.size(), weight.mutable_data());
  return py::make_tuple(start, weight, axis.first(), axis.last());
}

void gather_plane(const std::vector<Array<std::int16_t>>& slices, const Array<float>& weights,
                  Array<float>& out) {
  const auto target = mutable_view(out);
  std::vector<const std::int16_t*> pointers;
  pointers.reserve(slices.size());
  for (const auto& slice : slices) {
    if (static_cast<std::size_t>(slice.size()) != target.size()) {
      throw std::invalid_argument("a slice does not have the size of the plane");
    }
    pointers.push_back(slice.data());
  }
  const auto weight = view(weights);
  py::gil_scoped_release release;
  pe_infer::gather_plane(pointers, weight, target);
}

void window_plane(const Array<float>& hu, float low_hu, float high_hu, Array<float>& out) {
  const auto source = view(hu);
  const auto target = mutable_view(out);
  py::gil_scoped_release release;
  pe_infer::window_plane(source, low_hu, high_hu, target);
}

double gate_fraction(const Array<float>& hu, float low_hu, float high_hu, float tissue_hu) {
  if (hu.ndim() != 2) throw std::invalid_argument("gate plane must have two dimensions");
  const auto source = view(hu);
  const int rows = static_cast<int>(hu.shape(0)), cols = static_cast<int>(hu.shape(1));
  py::gil_scoped_release release;
  return pe_infer::gate_fraction(source, rows, cols, low_hu, high_hu, tissue_hu);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The windowing and resampling kernel; pe_infer.preprocess is its only user.";

  py::class_<pe_infer::SliceResampler>(m, "SliceResampler")
      .def(py::init([](int rows, int cols, double row_spacing, double col_spacing, bool transpose,
                       bool flip_rows, bool flip_cols, int out_rows, int out_cols,
                       double out_spacing) {
             const pe_infer::Orientation orientation{transpose, flip_rows, flip_cols};
             return pe_infer::SliceResampler(rows, cols, row_spacing, col_spacing, orientation,
                                             out_rows, out_cols, out_spacing);
           }),
           py::kw_only(), py::arg("rows"), py::arg("cols"), py::arg("row_spacing"),
           py::arg("col_spacing"), py::arg("transpose"), py::arg("flip_rows"), py::arg("flip_cols"),
           py::arg("out_rows"), py::arg("out_cols"), py::arg("out_spacing"))
      .def("run", &resample<std::int16_t>, py::arg("pixels").noconvert(), py::arg("slope"),
           py::arg("intercept"), py::arg("padding_low"), py::arg("padding_high"),
           py::arg("out").noconvert())
      .def("run", &resample<std::uint16_t>, py::arg("pixels").noconvert(), py::arg("slope"),
           py::arg("intercept"), py::arg("padding_low"), py::arg("padding_high"),
           py::arg("out").noconvert());

  m.def("axis_weights", &axis_weights, py::arg("in_size"), py::arg("in_spacing"),
        py::arg("out_size"), py::arg("out_spacing"));
  m.def("gather_plane", &gather_plane, py::arg("slices").noconvert(),
        py::arg("weights").noconvert(), py::arg("out").noconvert());
  m.def("window_plane", &window_plane, py::arg("hu").noconvert(), py::arg("low_hu"),
        py::arg("high_hu"), py::arg("out").noconvert());
  m.def("gate_fraction", &gate_fraction, py::arg("hu").noconvert(), py::arg("low_hu"),
        py::arg("high_hu"), py::arg("tissue_hu"));
}
