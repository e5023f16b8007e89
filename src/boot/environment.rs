//! The workload's environment.

use crate::error::Result;
use proto::config::Config;
use proto::environment::{DEFAULT_PATH, Environment};

/// Fills an empty environment with the workload's. Returns whether image or document set HOME, and not to
/// nothing (runc); otherwise HOME is `home`.
pub fn fill(new: &mut Environment, config: &Config, home: &[u8]) -> Result<bool> {
    fill_without_home(new, config)?;
    let sets_home = new.get(b"HOME=").is_some_and(|value| !value.is_empty());
    if !sets_home {
        new.set(b"HOME=", home)?;
    }
    Ok(sets_home)
}

/// The same without a default for HOME, which depends on the root's /etc/passwd.
pub fn fill_without_home(new: &mut Environment, config: &Config) -> Result {
    let [image, extra] = config.environment();
    new.set_all(image)?;
    new.set_all(extra)?;
    new.set_default(b"PATH=", DEFAULT_PATH)?;
    Ok(())
}
