"""The errors that users see."""


class DwdpError(RuntimeError):
    """Base of this package's errors."""


class DwdpConfigError(DwdpError, ValueError):
    """The options, or their combination with SGLang's, cannot work. Raised before anything is allocated."""


class DwdpSetupError(DwdpError):
    """Sharing the experts failed on this rank, or a peer reported that it failed there."""


class DwdpRuntimeError(DwdpError):
    """The runtime found itself bypassed, or its copies stopped."""


class DwdpUpdateError(DwdpError):
    """New weights were not taken, on any rank: the old ones serve on."""
