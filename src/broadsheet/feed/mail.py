"""Messages as the mail standards want them, and the SMTP connection that takes them.

Headers and addresses go through the standard library's ``EmailMessage``: it refuses line breaks (header injection) and
encodes what is not ASCII (RFC 2047, quoted-printable UTF-8 bodies).
"""

import ipaddress
import smtplib
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, parseaddr
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from broadsheet.errors import InvalidInput

TIMEOUT_SECONDS = 30


class Refused(Exception):
    """The server will not take this message, now or later."""


class TryLater(Exception):
    """Not taken now: the server asks for patience, or the connection broke before the content was sent."""


class Unreachable(TryLater):
    """No connection to the server, so that no letter can be sent now."""


@dataclass(frozen=True)
class Letter:
    """A mail before it becomes a MIME message.

    Args:
        message_id: without angle brackets; the same for every try, so that a mailbox can tell a copy.
    """

    to: str
    subject: str
    text: str
    html: str = ""
    message_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def mime(self, sender: str) -> EmailMessage:
        """The message with plain text first and HTML as the alternative.

        Raises:
            InvalidInput: a header holds a line break, or an address cannot be read.
        """
        message = EmailMessage(policy=SMTP)
        try:
            message["From"], message["To"] = _address(sender), _address(self.to)
            message["Subject"] = self.subject
            message["Date"] = formatdate(usegmt=True)
            if self.message_id:
                message["Message-ID"] = f"<{self.message_id}>"
            for name, value in self.headers.items():
                message[name] = value
        except (ValueError, IndexError) as error:
            raise InvalidInput(f"a mail to {self.to[:80]!r}: {error}") from error
        message.set_content(self.text, cte="quoted-printable")
        if self.html:
            message.add_alternative(self.html, subtype="html", cte="quoted-printable")
        return message


def _address(text: str) -> Address:
    name, address = parseaddr(text)
    if any(c in text for c in "\r\n") or "@" not in address:
        raise InvalidInput(f"mail address {text[:80]!r} cannot be read")
    return Address(name, addr_spec=address)


def _on_this_machine(host: str) -> bool:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


class Uncertain(Exception):
    """The connection broke while the content was on the wire: taken or not, nobody can tell."""


class Mailer:
    """One SMTP connection, opened at the first letter.

    Args:
        url: ``smtps://user:password@host:465`` (TLS from the start) or ``smtp://...:587``, which must offer STARTTLS:
            without it nothing is sent, except to a host on this machine or with ``?starttls=never``.
        sender: the From address.

    Raises:
        InvalidInput: the URL cannot be read.
    """

    def __init__(self, url: str, sender: str, *, context: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise InvalidInput(f"mail_url {parts.scheme}://...: expected smtp://user:password@host:587 or smtps://")
        self.sender, self.context = sender, context
        self.tls = parts.scheme == "smtps"
        self.host, self.port = parts.hostname, parts.port or (465 if self.tls else 587)
        self.user, self.password = unquote(parts.username or ""), unquote(parts.password or "")
        self.starttls = not self.tls and parse_qs(parts.query).get("starttls") != ["never"]
        self._connection: smtplib.SMTP | None = None
        _address(sender)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def send(self, letter: Letter, before_data: Callable[[], None] = lambda: None) -> None:
        """Hand one letter over.

        Args:
            before_data: called when the server has said yes to sender and recipient and waits for the content: the
                last moment at which the letter is certainly not delivered.

        Raises:
            Unreachable: no connection, no TLS, or no sign-in.
        TryLater: a temporary answer (4xx), or the connection broke.
            Refused: a permanent answer (5xx).
        """
        message = letter.mime(self.sender)
        _, source = parseaddr(self.sender)
        _, target = parseaddr(letter.to)
        server, handed_over = self._connected(), False
        try:
            self._expect(server.mail(source), 250)
            self._expect(server.rcpt(target), 250, 251)
            self._expect(server.docmd("DATA"), 354)
            before_data()
            body, handed_over = message.as_bytes(policy=SMTP), True
            server.send(smtplib._quote_periods(body) + (b"" if body.endswith(b"\r\n") else b"\r\n") + b".\r\n")  # pyright: ignore[reportAttributeAccessIssue]
            self._expect(server.getreply(), 250)
        except (OSError, smtplib.SMTPException) as error:
            self.hang_up()
            kind = Uncertain if handed_over else TryLater
            raise kind(f"{self.host}: {error}") from error
        except (Refused, TryLater):
            self._reset()
            raise

    @staticmethod
    def _expect(reply: tuple[int, bytes], *wanted: int) -> None:
        code, text = reply
        if code not in wanted:
            kind = Refused if 500 <= code < 600 else TryLater
            raise kind(f"{code} {text.decode(errors='replace')[:300]}")

    def _connected(self) -> smtplib.SMTP:
        if self._connection is not None:
            try:
                if self._connection.noop()[0] == 250:
                    return self._connection
            except (OSError, smtplib.SMTPException):
                pass  # it hung up while we were idle
            self.close()
        try:
            self._connection = self._open()
        except (OSError, smtplib.SMTPException) as error:
            raise Unreachable(f"{self.host}:{self.port}: {error}") from error
        return self._connection

    def _open(self) -> smtplib.SMTP:
        context = self.context or ssl.create_default_context()
        if self.tls:
            server: smtplib.SMTP = smtplib.SMTP_SSL(self.host, self.port, timeout=TIMEOUT_SECONDS, context=context)
        else:
            server = smtplib.SMTP(self.host, self.port, timeout=TIMEOUT_SECONDS)
        try:
            server.ehlo()
            if self.starttls and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
            elif self.starttls and not _on_this_machine(self.host):
                raise Unreachable(f"{self.host} offers no STARTTLS: nothing is sent in the clear")
            if self.user:
                server.login(self.user, self.password)
        except BaseException:
            server.close()
            raise
        return server

    def _reset(self) -> None:
        try:
            if self._connection is not None:
                self._connection.rset()
        except (OSError, smtplib.SMTPException):
            self.close()

    def close(self) -> None:
        """Say goodbye to the server."""
        if self._connection is None:
            return
        try:
            self._connection.quit()
        except (OSError, smtplib.SMTPException):
            self._connection.close()
        self._connection = None

    def hang_up(self) -> None:
        """Drop the connection without a word: inside a letter a goodbye would be read as text, and not answered."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
