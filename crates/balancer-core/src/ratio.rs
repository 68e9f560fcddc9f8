//! The spot ratio, an exact integer, so that every replica, the memory store and the Redis scripts decide alike.

use std::fmt;
use std::str::FromStr;

use crate::text::shorten;

/// The wanted share of spot executors, 0 to 1, in steps of one billionth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ratio(u32);

/// Why a text is not a [`Ratio`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RatioError {
    /// The text is neither a decimal, nor a percentage, nor a known name.
    #[error("{0:?} is not a ratio; {ACCEPTED}")]
    NotARatio(String),
    /// The number is outside 0 to 1 (0 to 100 for a percentage).
    #[error("{0:?} is outside 0 to 1; {ACCEPTED}")]
    OutOfRange(String),
}

const ACCEPTED: &str = "accepted: a decimal from 0 to 1 such as 0.7, a percentage such as 70%, or one of \
     RELIABILITY_ONLY, RELIABILITY_OVER_COST, BALANCED, COST_OVER_RELIABILITY, COST_ONLY";

/// Why a text is not a [`SpotRatio`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; or off, to opt out")]
pub struct SpotRatioError(pub RatioError);

/// What a job states as its spot ratio: a [`Ratio`], or that it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpotRatio {
    /// `off`: the job is opted out. Its executors are neither placed nor counted.
    Off,
    /// The wanted share of spot.
    Share(Ratio),
}

impl SpotRatio {
    /// Everything on-demand.
    pub const ZERO: Self = Self::Share(Ratio::ZERO);
    /// Half on spot.
    pub const HALF: Self = Self::Share(Ratio::HALF);
    /// Everything on spot.
    pub const ONE: Self = Self::Share(Ratio::ONE);

    /// The wanted share of spot; `None` if the job is opted out.
    pub const fn share(self) -> Option<Ratio> {
        match self {
            Self::Off => None,
            Self::Share(ratio) => Some(ratio),
        }
    }
}

impl From<Ratio> for SpotRatio {
    fn from(ratio: Ratio) -> Self {
        Self::Share(ratio)
    }
}

impl FromStr for SpotRatio {
    type Err = SpotRatioError;

    /// `off` in any case, or what [`Ratio`] accepts.
    fn from_str(text: &str) -> Result<Self, SpotRatioError> {
        if text.trim().eq_ignore_ascii_case("off") {
            return Ok(Self::Off);
        }
        text.parse().map(Self::Share).map_err(SpotRatioError)
    }
}

impl fmt::Display for SpotRatio {
    /// `off`, or the ratio as a decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Share(ratio) => ratio.fmt(f),
        }
    }
}

impl Ratio {
    /// The ratio 1, in billionths.
    pub const ONE_IN_BILLIONTHS: u32 = 1_000_000_000;
    /// Everything on-demand.
    pub const ZERO: Self = Self(0);
    /// Everything on spot.
    pub const ONE: Self = Self(Self::ONE_IN_BILLIONTHS);

    /// Half on spot.
    pub const HALF: Self = Self(Self::ONE_IN_BILLIONTHS / 2);

    /// Names for common ratios.
    pub const NAMES: [(&'static str, Self); 5] = [
        ("RELIABILITY_ONLY", Self::ZERO),
        ("RELIABILITY_OVER_COST", Self(300_000_000)),
        ("BALANCED", Self::HALF),
        ("COST_OVER_RELIABILITY", Self(800_000_000)),
        ("COST_ONLY", Self::ONE),
    ];

    /// A ratio in billionths; `None` above [`Ratio::ONE_IN_BILLIONTHS`].
    pub const fn from_billionths(billionths: u32) -> Option<Self> {
        if billionths <= Self::ONE_IN_BILLIONTHS { Some(Self(billionths)) } else { None }
    }

    /// The ratio in billionths.
    pub const fn billionths(self) -> u32 {
        self.0
    }

    /// Whether `part` is a larger share of `all` than this.
    pub fn is_exceeded_by(self, part: u64, all: u64) -> bool {
        let one = u128::from(Self::ONE_IN_BILLIONTHS);
        u128::from(part) * one > u128::from(all) * u128::from(self.0)
    }
}

impl FromStr for Ratio {
    type Err = RatioError;

    /// Parses `0.7`, `.7`, `70%` or `BALANCED`, and ignores surrounding white space and the case of names. Rounds
    /// half up after nine decimals. A sign, an exponent, NaN and infinity are errors.
    fn from_str(text: &str) -> Result<Self, RatioError> {
        let trimmed = text.trim();
        if let Some((_, ratio)) = Self::NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(trimmed)) {
            return Ok(*ratio);
        }
        let (number, unit) = match trimmed.strip_suffix('%') {
            Some(percent) => (percent.trim_end(), u128::from(Self::ONE_IN_BILLIONTHS / 100)),
            None => (trimmed, u128::from(Self::ONE_IN_BILLIONTHS)),
        };
        let steps = decimal_times(number, unit).ok_or_else(|| {
            // "-0.1" and "inf" are numbers, so their error is the range.
            match number.parse::<f64>() {
                Ok(value) if value < 0.0 || value.is_infinite() => RatioError::OutOfRange(shorten(trimmed)),
                _ => RatioError::NotARatio(shorten(trimmed)),
            }
        })?;
        u32::try_from(steps)
            .ok()
            .and_then(Self::from_billionths)
            .ok_or_else(|| RatioError::OutOfRange(shorten(trimmed)))
    }
}

/// A decimal times `unit`, rounded half up; `None` for anything but digits and one point. Saturates far above
/// every ratio, so that a long number is out of range and does not overflow.
fn decimal_times(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) {
        return None;
    }
    let whole = whole.bytes().fold(0u128, |n, b| n.saturating_mul(10).saturating_add(u128::from(b - b'0')));
    // Further digits than twenty could change the rounding only at a tie.
    let mut part = 0u128;
    let mut scale = 1u128;
    for b in fraction.bytes().take(20) {
        part = part * 10 + u128::from(b - b'0');
        scale *= 10;
    }
    let part = (part * unit * 2 + scale) / (scale * 2);
    Some(whole.saturating_mul(unit).saturating_add(part))
}

impl fmt::Display for Ratio {
    /// The shortest decimal, such as `0`, `0.7` or `1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0 / Self::ONE_IN_BILLIONTHS;
        let part = self.0 % Self::ONE_IN_BILLIONTHS;
        if part == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{part:09}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_accepted_form_has_its_exact_value() {
        for (text, billionths) in [
            ("0", 0),
            ("0.0", 0),
            ("0.7", 700_000_000),
            (".7", 700_000_000),
            ("1.", 1_000_000_000),
            ("1", 1_000_000_000),
            ("1.000", 1_000_000_000),
            ("00.5", 500_000_000),
            ("70%", 700_000_000),
            ("70 %", 700_000_000),
            ("33.3%", 333_000_000),
            ("0%", 0),
            ("100%", 1_000_000_000),
            (" 0.25\n", 250_000_000),
            ("0.30000000000000004", 300_000_000),
            ("0.3333333335", 333_333_334),
            ("balanced", 500_000_000),
            ("Cost_Only", 1_000_000_000),
            ("RELIABILITY_ONLY", 0),
            ("reliability_over_cost", 300_000_000),
            ("COST_OVER_RELIABILITY", 800_000_000),
        ] {
            assert_eq!(text.parse::<Ratio>().map(Ratio::billionths), Ok(billionths), "{text:?}");
        }
    }

    #[test]
    fn off_in_any_case_is_no_share() {
        for text in ["off", "OFF", " Off\n"] {
            assert_eq!(text.parse(), Ok(SpotRatio::Off), "{text:?}");
        }
        assert_eq!(SpotRatio::Off.to_string(), "off");
        assert_eq!((SpotRatio::Off.share(), SpotRatio::ZERO.share()), (None, Some(Ratio::ZERO)));
        assert!(matches!("of".parse::<SpotRatio>(), Err(SpotRatioError(RatioError::NotARatio(_)))));
    }

    #[test]
    fn numbers_outside_the_range_are_out_of_range() {
        for text in [
            "1.000000001",
            "1.1",
            "2",
            "70",
            "101%",
            "100.0001%",
            "-0.1",
            "-1",
            "inf",
            "-Infinity",
            "9999999999999999999999999999999999999999999999",
        ] {
            assert!(matches!(text.parse::<Ratio>(), Err(RatioError::OutOfRange(_))), "{text:?}");
        }
    }

    #[test]
    fn other_texts_are_not_a_ratio() {
        for text in [
            "", " ", ".", "%", "NaN", "nan%", "0,7", "0.7.1", "1e-1", "+0.5", "half", "7/10", "0x1", "70%%", "% 70",
            "０.７", "0 .7",
        ] {
            assert!(matches!(text.parse::<Ratio>(), Err(RatioError::NotARatio(_))), "{text:?}");
        }
    }

    #[test]
    fn the_error_names_the_value_and_what_is_accepted_and_stays_short() {
        let error = "x".repeat(100_000).parse::<Ratio>().unwrap_err().to_string();
        assert!(error.contains("70%") && error.contains("BALANCED"), "{error}");
        assert!(error.len() < 400, "{}", error.len());
    }

    #[test]
    fn only_a_job_can_be_off() {
        assert_eq!(" OFF ".parse(), Ok(SpotRatio::Off));
        assert_eq!("70%".parse(), Ok(SpotRatio::Share(Ratio(700_000_000))));
        assert!("half".parse::<SpotRatio>().unwrap_err().to_string().ends_with("; or off, to opt out"));
        let error = "off".parse::<Ratio>().unwrap_err().to_string();
        assert!(error.ends_with("COST_ONLY"), "{error}");
    }

    proptest! {
        #[test]
        fn parse_returns_what_display_wrote(billionths in 0u32..=Ratio::ONE_IN_BILLIONTHS) {
            let ratio = Ratio::from_billionths(billionths).unwrap();
            prop_assert_eq!(ratio.to_string().parse::<Ratio>(), Ok(ratio));
            prop_assert_eq!(ratio.to_string().parse::<SpotRatio>(), Ok(ratio.into()));
        }

        #[test]
        fn no_text_panics(text in ".{0,64}") {
            let _ = text.parse::<Ratio>();
        }
    }
}
