"""C-STORE in both directions on pynetdicom's library core, never on its applications (CVE-2026-56445 is in those).

Source: PS3.7 section 9.1.1, PS3.4 annex B; status codes from PS3.4 table B.2-1.
"""

from __future__ import annotations

import logging
import ssl
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from medseg.errors import BatchError, ConfigError, MedsegError, ReadError
from medseg.pacs import need
from medseg.pacs.inbox import Inbox
from medseg.pacs.settings import ListenConfig, Target, Tls
from medseg.readers.dicom_identity import Identity, identify

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000
WARNINGS = (0xB000, 0xB006, 0xB007, 0x0001, 0x0107, 0x0116)
"""The object was stored, with some change (PS3.4 table B.2-1; PS3.7 annex C)."""
LABELMAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
SYNTAXES = (
    *("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"),  # not compressed
    "1.2.840.10008.1.2.5",  # RLE
    *("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"),  # JPEG
    *("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),  # JPEG-LS
    *("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"),  # JPEG 2000
    *("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"),  # HTJ2K
)
CONTEXTS = 128
"""An association proposes so many kinds of object at most (PS3.8 section 9.3.2.2)."""
ASSOCIATION_SECONDS, SILENCE_SECONDS = 30.0, 120.0


@dataclass
class Tally:
    """What a receiver has seen since it started."""

    received: int = 0
    ignored: int = 0
    refused: int = 0
    lock: Any = field(default_factory=threading.Lock, repr=False)

    def count(self, what: str) -> None:
        """Count one instance as received, ignored or refused."""
        with self.lock:
            setattr(self, what, getattr(self, what) + 1)


class Receiver:
    """A C-STORE and C-ECHO provider that puts images into an inbox; success is answered when they are safe on disk.

    What is no image, comes from medseg itself or has none of `modalities` (where there are any) is answered with
    success and dropped: there is nothing to segment in it.
    """

    def __init__(
        self,
        settings: ListenConfig,
        inbox: Inbox,
        tell: Callable[[str], None],
        *,
        modalities: Collection[str] = (),
    ) -> None:
        self.settings, self.inbox, self.tell, self.modalities = settings, inbox, tell, modalities
        self.tally = Tally()
        self._server: Any = None
        self._sizes: dict[int, int] = {}

    def start(self) -> None:
        """Open the port; raise ConfigError where it cannot be opened, or certificates cannot be used."""
        net, events = need("pynetdicom"), need("pynetdicom.events")
        _quiet()
        ae = net.AE(ae_title=self.settings.ae_title)
        ae.require_called_aet = True
        ae.require_calling_aet = list(self.settings.calling)
        ae.maximum_pdu_size = self.settings.max_pdu
        ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = ASSOCIATION_SECONDS, SILENCE_SECONDS, SILENCE_SECONDS
        for context in net.AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax, list(SYNTAXES))
        ae.add_supported_context(LABELMAP_STORAGE, list(SYNTAXES))
        ae.add_supported_context(net.sop_class.Verification)
        handlers = [
            (events.EVT_C_STORE, self._store),
            (events.EVT_DATA_RECV, self._data),
            (events.EVT_CONN_CLOSE, self._closed),
        ]
        address = (self.settings.host, self.settings.port)
        try:
            self._server = ae.start_server(
                address, block=False, evt_handlers=handlers, ssl_context=_acceptor_tls(self.settings.tls)
            )
        except OSError as error:
            raise ConfigError(
                f"{self.settings.host}:{self.settings.port}: this address cannot be listened on ({error.strerror}); "
                "choose another port, or end the process that has it"
            ) from error

    def stop(self) -> None:
        """Close the port and end what is being received; what was confirmed is in the inbox."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()

    def _data(self, event: Any) -> None:
        """End an association that sends more for one instance than is allowed, before it fills the memory."""
        key = id(event.assoc)
        self._sizes[key] = self._sizes.get(key, 0) + len(event.data)
        if self._sizes[key] > self.settings.max_instance_bytes + 2**20:
            self.tell(f"a sender was cut off: more than {self.settings.max_instance_bytes} bytes for one instance")
            self.tally.count("refused")
            self._sizes.pop(key)
            event.assoc.abort()

    def _closed(self, event: Any) -> None:
        self._sizes.pop(id(event.assoc), None)

    def _store(self, event: Any) -> int:
        self._sizes.pop(id(event.assoc), None)
        status, what = self._take(event)
        self.tally.count(what)
        return status

    def _take(self, event: Any) -> tuple[int, str]:
        raw = event.encoded_dataset()
        try:
            item = identify(BytesIO(raw))
        except ReadError:
            self.tell("an instance was refused: its identifiers cannot be read")
            return CANNOT_UNDERSTAND, "refused"
        if (item.sop_class, item.instance) != (
            str(event.request.AffectedSOPClassUID),
            str(event.request.AffectedSOPInstanceUID),
        ):
            self.tell("an instance was refused: it is not what the sender announced")
            return MISMATCH, "refused"
        other = bool(self.modalities) and item.modality not in self.modalities
        if not item.is_image or item.is_ours or other:
            return SUCCESS, "ignored"  # also our own results, when an archive routes them back to us
        try:
            self.inbox.receive(raw, item)
        except MedsegError as error:
            self.tell(f"an instance was refused: {error.code}: {error}")
            return OUT_OF_RESOURCES, "refused"
        return SUCCESS, "received"


class Node:
    """A destination that takes results by C-STORE; its status "success" is the confirmation."""

    def __init__(self, target: Target, *, calling: str, tls: Tls | None = None) -> None:
        self.target, self.calling, self.tls = target, calling, tls

    @property
    def name(self) -> str:
        """AE title and address."""
        return f"{self.target.ae_title}@{self.target.host}:{self.target.port}"

    def send(self, files: Sequence[Path]) -> None:
        """Send DICOM files over one association; see medseg.pacs.delivery.Destination."""
        items = [(file, identify(file)) for file in files]
        with self._associate([item for _, item in items]) as association:
            for file, item in items:
                self._send(association, file, item)

    def _send(self, association: Any, file: Path, item: Identity) -> None:
        try:
            status = association.send_c_store(file)
        except (ValueError, AttributeError) as error:  # no context was accepted for this kind of object
            raise BatchError(
                f"{self.name}: the node does not take this kind of result ({item.modality})", code="SEND_REFUSED"
            ) from error
        except RuntimeError as error:
            raise BatchError(f"{self.name}: the association ended", code="PACS_UNREACHABLE") from error
        code = status.get("Status") if "Status" in status else None
        if code is None:
            raise BatchError(f"{self.name}: no answer to a result that was sent", code="PACS_UNREACHABLE")
        if code != SUCCESS and code not in WARNINGS:
            raise BatchError(f"{self.name}: the node did not take a result (status 0x{code:04X})", code="SEND_REFUSED")

    @contextmanager
    def _associate(self, items: Sequence[Identity]) -> Iterator[Any]:
        net = need("pynetdicom")
        _quiet()
        ae = net.AE(ae_title=self.calling)
        ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = ASSOCIATION_SECONDS, SILENCE_SECONDS, SILENCE_SECONDS
        ae.connection_timeout = ASSOCIATION_SECONDS
        for sop_class, syntax in sorted({(item.sop_class, item.syntax) for item in items})[:CONTEXTS]:
            ae.add_requested_context(sop_class, syntax)
        tls = None if self.target.authorities is None else (_requestor_tls(self.target.authorities, self.tls), None)
        host, port, title = self.target.host, self.target.port, self.target.ae_title
        association = ae.associate(host, port, ae_title=title, tls_args=tls)
        if not association.is_established:
            if association.is_rejected:
                raise BatchError(
                    f"{self.name}: the node refuses us; does it know the AE title {self.calling}?", code="PACS_REFUSED"
                )
            raise BatchError(f"{self.name}: no association could be opened", code="PACS_UNREACHABLE")
        try:
            yield association
        finally:
            association.release()


def _quiet() -> None:
    """Silence pynetdicom and pydicom for good: they log UIDs and values, pynetdicom's threads outside of `quiet`."""
    need("pynetdicom._config").LOG_HANDLER_LEVEL = "none"  # type: ignore[attr-defined]
    for name in ("pynetdicom", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")


def _acceptor_tls(tls: Tls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, tls, tls.authorities)
    if tls.authorities:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _requestor_tls(authorities: Path, tls: Tls | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    context.check_hostname = False  # nodes are known by address; who signed their certificate is what counts
    _load(context, tls, authorities)
    return context


def _load(context: ssl.SSLContext, tls: Tls | None, authorities: Path | None) -> None:
    try:
        if tls is not None:
            context.load_cert_chain(tls.certificate, tls.key)
        if authorities is not None:
            context.load_verify_locations(authorities)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"tls: a certificate or key cannot be used ({error.strerror or error})") from error
