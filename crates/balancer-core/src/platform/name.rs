//! The names of profiles.

use std::fmt;
use std::str::FromStr;

use crate::text::shorten;

use super::CapacityProfile;

/// A text that is not a [`CapacityProfile`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a capacity profile; accepted: {names}", names = CapacityProfile::ALL.map(CapacityProfile::as_str).join(", "))]
pub struct CapacityProfileError(String);

impl FromStr for CapacityProfile {
    type Err = CapacityProfileError;

    /// Ignores case and surrounding white space.
    fn from_str(text: &str) -> Result<Self, CapacityProfileError> {
        let name = text.trim();
        let found = Self::ALL.into_iter().find(|profile| profile.as_str().eq_ignore_ascii_case(name));
        found.ok_or_else(|| CapacityProfileError(shorten(name)))
    }
}

impl fmt::Display for CapacityProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
