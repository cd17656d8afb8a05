"""A first stage as a bundle has it, on the engine that runs bundles."""

from export.onnx_export import Array, GraphNode, export_graph, round_weights
from pe_infer.engines import EngineOptions, select


class SlabEncoder:
    """The encoder graph of a system, compiled."""

    def __init__(self, node: GraphNode, *, threads: int | None = None) -> None:
        """Round, export and compile.

        Args:
            node: The encoder; its weights are rounded in place.
            threads: Of the engine; ``None`` is one per core.
        """
        round_weights([node])
        self._node = node
        self._session = (
            select(options=EngineOptions(threads=threads))
            .compile(
                export_graph(node).SerializeToString(), name=node.name, precision=node.precision
            )
            .session()
        )

    def __call__(self, slab: Array) -> dict[str, Array]:
        """Slab (1, channels, rows, cols) in [0, 1] to copies of the graph's outputs by name."""
        outputs = self._session.run({self._node.input_names[0]: slab})
        return {name: outputs[name].copy() for name in self._node.output_names}
