//! Messages of the control socket and the transport that carries them
