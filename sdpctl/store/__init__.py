"""The artifact store: an OCI image layout on disk, with a writer that is safe among processes and crashes.

It knows nothing of machine learning: an artifact is a kind, layers with titles, a subject, and a key.
"""

from sdpctl.store.layout import Artifact, Descriptor
from sdpctl.store.store import GcReport, Store

__all__ = ["Artifact", "Descriptor", "GcReport", "Store"]
