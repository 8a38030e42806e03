"""The artifact store: an OCI image layout on disk that several processes may write, and that survives crashes.

The store knows nothing of machine learning. An artifact has a kind, layers with titles, a subject and a key.
"""

from sdpctl.store.layout import Artifact, Descriptor
from sdpctl.store.store import GcReport, Removal, Store

__all__ = ["Artifact", "Descriptor", "GcReport", "Removal", "Store"]
