//! Port forwarding.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    str::FromStr,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use pigeon::forward::Forward;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{
    output::{note, say},
    target::Target,
};

/// `[[ADDRESS:]HOST:]GUEST`, as in `docker run -p`, but on 127.0.0.1 by default.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Port {
    /// The host's listening address.
    pub address: IpAddr,
    /// 0 for any free port.
    pub host: u16,
    pub guest: u16,
}

impl Port {
    /// Forwards a free port of the host.
    pub fn any(guest: u16) -> Port {
        Port {
            address: Ipv4Addr::LOCALHOST.into(),
            host: 0,
            guest,
        }
    }

    /// Starts forwarding.
    pub fn forward(self, uds: &Path) -> Result<Forward> {
        let target = format!("127.0.0.1:{}", self.guest);
        let guest = self.guest;
        let failed = move |error| note!("port {guest}: {error}");
        Forward::start((self.address, self.host), uds, &target, failed)
    }
}

impl FromStr for Port {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Port> {
        let usage = || format!("{text:?} is not [[ADDRESS:]HOST:]GUEST, such as 8080:80");
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        if protocol != "tcp" {
            bail!("{text:?}: only TCP can be forwarded");
        }
        let (before, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
        let (address, host) = match before.rsplit_once(':') {
            None => (Ipv4Addr::LOCALHOST.into(), before),
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (address.parse().with_context(usage)?, host)
            }
        };
        let number = |text: &str| text.parse::<u16>().with_context(usage);
        let host = if host.is_empty() { 0 } else { number(host)? };
        let guest = number(guest)?;
        if guest == 0 {
            bail!(usage());
        }
        Ok(Port {
            address,
            host,
            guest,
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let at = SocketAddr::new(self.address, self.host);
        write!(f, "{at}->{}/tcp", self.guest)
    }
}

#[derive(Args)]
pub struct ForwardPorts {
    /// Ports: GUEST, HOST:GUEST or ADDRESS:HOST:GUEST
    #[arg(required = true)]
    ports: Vec<String>,
    #[command(flatten)]
    target: Target,
}

impl ForwardPorts {
    /// Passes connections on until Ctrl-C.
    pub fn run(&self) -> Result<()> {
        let mut signals = crate::catch(&[SIGHUP, SIGINT, SIGTERM])?;
        let client = self.target.client(None)?;
        let mut forwards = vec![];
        for text in &self.ports {
            let port = match text.parse::<u16>() {
                Ok(number) => format!("{number}:{number}").parse::<Port>()?,
                Err(_) => text.parse()?,
            };
            let forward = port.forward(client.uds())?;
            say!("{}->{}/tcp", forward.address(), port.guest)?;
            forwards.push(forward);
        }
        signals.forever().next();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_on_the_loopback_interface_unless_told_otherwise() {
        for (text, shown) in [
            ("8080:80", "127.0.0.1:8080->80/tcp"),
            (":80", "127.0.0.1:0->80/tcp"),
            ("80", "127.0.0.1:0->80/tcp"),
            ("0.0.0.0:8080:80/tcp", "0.0.0.0:8080->80/tcp"),
            ("[::1]:8080:80", "[::1]:8080->80/tcp"),
            ("10.0.0.1::80", "10.0.0.1:0->80/tcp"),
        ] {
            assert_eq!(text.parse::<Port>().unwrap().to_string(), shown, "{text}");
        }
        for text in [
            "",
            "0",
            "8080:0",
            "8080:",
            "a:80",
            "x:8080:80",
            "8080:80/udp",
            "70000:80",
        ] {
            assert!(text.parse::<Port>().is_err(), "{text}");
        }
    }
}
