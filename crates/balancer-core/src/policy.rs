//! What a job asks for: its ratio and its on-demand base, and what the annotations of a pod state
//! of them.

use crate::ratio::{Ratio, RatioError};
use crate::text::shorten;

/// What a job asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The wanted share of spot among the executors past the base.
    pub ratio: Ratio,
    /// Executors that must be on-demand before the ratio applies.
    pub base: u32,
}

/// What holds where a job states nothing, or states it wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// `DEFAULT_SPOT_RATIO`.
    pub ratio: Ratio,
}

impl Default for Defaults {
    /// 0.5, and no base (DESIGN section 3).
    fn default() -> Self {
        Self { ratio: Ratio::from_billionths(Ratio::ONE_IN_BILLIONTHS / 2).unwrap_or(Ratio::ZERO) }
    }
}

impl Defaults {
    /// The policy of a job that states nothing.
    pub const fn policy(self) -> Policy {
        Policy { ratio: self.ratio, base: 0 }
    }

    /// The policy of a job whose driver states `stated`.
    pub fn complete(self, overrides: &PolicyOverrides) -> Policy {
        overrides.or_default(self.policy())
    }
}

/// What the annotations of one pod validly state of a policy; each part by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyOverrides {
    /// The ratio, where the pod states a valid one.
    pub ratio: Option<Ratio>,
    /// The on-demand base, where the pod states a valid one.
    pub base: Option<u32>,
}

impl PolicyOverrides {
    /// The policy, if both parts of it are known: each from here, else from `rest`.
    pub fn or(self, rest: Option<Policy>) -> Option<Policy> {
        Some(Policy {
            ratio: self.ratio.or(rest.map(|policy| policy.ratio))?,
            base: self.base.or(rest.map(|policy| policy.base))?,
        })
    }

    /// The policy: each part from here, else from `rest`.
    pub fn or_default(self, rest: Policy) -> Policy {
        Policy { ratio: self.ratio.unwrap_or(rest.ratio), base: self.base.unwrap_or(rest.base) }
    }

    /// Reads the values of the two annotations; what cannot be read is left out and told.
    pub fn read(ratio: Option<&str>, base: Option<&str>) -> (Self, Vec<Invalid>) {
        let mut invalid = Vec::new();
        let ratio = ratio.and_then(|text| text.parse().map_err(|e| invalid.push(Invalid::Ratio(e))).ok());
        let base = base.and_then(|text| read_base(text).map_err(|e| invalid.push(Invalid::Base(e))).ok());
        (Self { ratio, base }, invalid)
    }
}

/// A part of a policy that someone stated and we cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The ratio.
    #[error(transparent)]
    Ratio(#[from] RatioError),
    /// The on-demand base.
    #[error(transparent)]
    Base(#[from] BaseError),
}

/// Why a text is not an on-demand base.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an on-demand base; accepted: a whole number from 0 to {max}", max = BaseError::MOST)]
pub struct BaseError(String);

impl BaseError {
    /// The largest base: far above any job, and far below where the scripts' numbers lose exactness.
    pub const MOST: u32 = 1_000_000;
}

fn read_base(text: &str) -> Result<u32, BaseError> {
    let trimmed = text.trim();
    match trimmed.parse() {
        // `u32::from_str` takes a sign; a base has none.
        Ok(base) if base <= BaseError::MOST && !trimmed.starts_with('+') => Ok(base),
        _ => Err(BaseError(shorten(trimmed))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_valid_part_stands_beside_an_invalid_one() {
        let (overrides, invalid) = PolicyOverrides::read(Some("lots"), Some("2"));
        assert_eq!(overrides, PolicyOverrides { ratio: None, base: Some(2) });
        assert_eq!(invalid.len(), 1);
        let (overrides, invalid) = PolicyOverrides::read(Some("0.7"), Some("-1"));
        assert_eq!(overrides.ratio, "0.7".parse().ok());
        assert_eq!(overrides.base, None);
        assert!(invalid[0].to_string().contains("\"-1\""), "{}", invalid[0]);
    }

    #[test]
    fn a_base_is_a_whole_number_within_its_bounds() {
        for (text, base) in [
            ("0", Some(0)),
            (" 3 ", Some(3)),
            ("1000000", Some(1_000_000)),
            ("1000001", None),
            ("+1", None),
            ("1.0", None),
            ("", None),
            ("-0", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(read_base(text).ok(), base, "{text:?}");
        }
    }
}
