//! The policy of a job: its spot ratio and its on-demand base, and how annotations and stores spell them.
//!
//! Every field of a policy is one row of the table in this file. From the table come [`Policy`],
//! [`PolicyOverrides`], [`PolicyField`] and [`InvalidValue`], and with them the annotation's default key, the
//! default value, the reason of the Event, the label of the metric and the field's key in a store.

use std::fmt;

use crate::ratio::{Ratio, SpotRatio, SpotRatioError};
use crate::text::shorten;

/// Generates the policy types. The doc comment of a row becomes the doc comment of its fields.
macro_rules! policy_table {
    ($(
        $(#[doc = $doc:literal])*
        $field:ident: $type:ty = $default:expr, as $variant:ident {
            key: $key:literal,
            annotation: $annotation:literal,
            parse: $parse:expr => $error:ty,
            event_reason: $event_reason:literal,
            metric_label: $metric_label:literal,
        }
    )*) => {
        /// What a job wants: how its executors are divided between spot and on-demand.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Policy {
            $($(#[doc = $doc])* pub $field: $type,)*
        }

        impl Policy {
            /// The policy of a job that states nothing.
            pub const DEFAULT: Self = Self { $($field: $default,)* };
        }

        /// The fields of a policy that a pod states, each valid. A field that is absent or invalid is `None`.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct PolicyOverrides {
            $($(#[doc = $doc])* pub $field: Option<$type>,)*
        }

        /// A field of a policy.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PolicyField {
            $($(#[doc = $doc])* $variant,)*
        }

        /// Why a value is invalid, with the cause as its parser returned it.
        #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
        pub enum InvalidValue {
            $($(#[doc = $doc])* #[error(transparent)] $variant($error),)*
        }

        impl PolicyField {
            /// Every field, in the order in which [`Policy::encode`] writes them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The key in a store, such as `spot-ratio`.
            pub const fn key(self) -> &'static str {
                match self { $(Self::$variant => $key,)* }
            }

            /// The annotation that states the field unless a setting names another one.
            pub const fn default_annotation(self) -> &'static str {
                match self { $(Self::$variant => $annotation,)* }
            }

            /// The reason of the Kubernetes Event about an invalid value.
            pub const fn event_reason(self) -> &'static str {
                match self { $(Self::$variant => $event_reason,)* }
            }

            /// The value of the metric label `field`.
            pub const fn metric_label(self) -> &'static str {
                match self { $(Self::$variant => $metric_label,)* }
            }
        }

        impl PolicyOverrides {
            /// The policy: each field from here, else from `rest`.
            pub fn or_default(self, rest: Policy) -> Policy {
                Policy { $($field: self.$field.unwrap_or(rest.$field),)* }
            }

            /// Each field from here, else from `rest`.
            pub fn or_overrides(self, rest: Self) -> Self {
                Self { $($field: self.$field.or(rest.$field),)* }
            }

            /// The fields of `self` that `keep` accepts; the others become `None`.
            pub fn filter(self, keep: impl Fn(PolicyField) -> bool) -> Self {
                Self { $($field: self.$field.filter(|_| keep(PolicyField::$variant)),)* }
            }

            /// The value of one field as text, as [`Policy::encode`] writes it.
            pub fn value(&self, field: PolicyField) -> Option<String> {
                match field { $(PolicyField::$variant => self.$field.map(|value| value.to_string()),)* }
            }

            /// Parses the text that `text_of` returns for each field. An invalid field becomes `None` and is
            /// reported.
            pub fn parse<'a>(text_of: impl Fn(PolicyField) -> Option<&'a str>) -> (Self, Vec<InvalidField>) {
                let (mut overrides, mut invalid) = (Self::default(), Vec::new());
                $(
                    let field = PolicyField::$variant;
                    match text_of(field).map($parse) {
                        Some(Ok(value)) => overrides.$field = Some(value),
                        Some(Err(cause)) => invalid.push(InvalidField { field, cause: InvalidValue::$variant(cause) }),
                        None => {}
                    }
                )*
                (overrides, invalid)
            }
        }

        impl From<Policy> for PolicyOverrides {
            fn from(policy: Policy) -> Self {
                Self { $($field: Some(policy.$field),)* }
            }
        }
    };
}

policy_table! {
    /// The wanted share of spot among the executors beyond the on-demand base, or that the job is opted out.
    spot_ratio: SpotRatio = SpotRatio::HALF, as SpotRatio {
        key: "spot-ratio",
        annotation: "workload/spot-ratio",
        parse: str::parse => SpotRatioError,
        event_reason: "InvalidSpotRatio",
        metric_label: "spot_ratio",
    }

    /// How many executors must run on-demand before the ratio applies.
    on_demand_base: u32 = 0, as OnDemandBase {
        key: "on-demand-base",
        annotation: "workload/on-demand-base",
        parse: parse_on_demand_base => WholeNumberError,
        event_reason: "InvalidOnDemandBase",
        metric_label: "on_demand_base",
    }

    /// How many spot executors of the job may run on one node; 0 for any number.
    max_executors_per_node: u32 = 0, as MaxExecutorsPerNode {
        key: "max-executors-per-node",
        annotation: "workload/max-executors-per-node",
        parse: parse_max_executors_per_node => WholeNumberError,
        event_reason: "InvalidMaxExecutorsPerNode",
        metric_label: "max_executors_per_node",
    }

    /// The largest share of the job's spot executors in one pool, above which new ones are steered to other pools; 1 for
    /// no limit.
    max_pool_share: Ratio = Ratio::ONE, as MaxPoolShare {
        key: "max-pool-share",
        annotation: "workload/max-pool-share",
        parse: parse_max_pool_share => MaxPoolShareError,
        event_reason: "InvalidMaxPoolShare",
        metric_label: "max_pool_share",
    }

    /// How many seconds a spot executor may be unschedulable before it is replaced on on-demand; 0 for any time.
    spot_fallback_seconds: u32 = 0, as SpotFallbackSeconds {
        key: "spot-fallback-seconds",
        annotation: "workload/spot-fallback-seconds",
        parse: parse_seconds => WholeNumberError,
        event_reason: "InvalidSpotFallbackSeconds",
        metric_label: "spot_fallback_seconds",
    }

    /// How many seconds spot stays closed for the job before one executor probes it.
    spot_retry_seconds: u32 = 300, as SpotRetrySeconds {
        key: "spot-retry-seconds",
        annotation: "workload/spot-retry-seconds",
        parse: parse_seconds => WholeNumberError,
        event_reason: "InvalidSpotRetrySeconds",
        metric_label: "spot_retry_seconds",
    }
}

impl PolicyOverrides {
    /// With the value of this text as the only field.
    ///
    /// # Errors
    /// If the value is invalid.
    pub fn parse_one(field: PolicyField, text: &str) -> Result<Self, InvalidField> {
        let (overrides, invalid) = Self::parse(|other| (other == field).then_some(text));
        invalid.into_iter().next().map_or(Ok(overrides), Err)
    }

    /// The policy if what decides on a capacity is known: each field from here, else from `rest`.
    pub fn or(self, rest: Option<Policy>) -> Option<Policy> {
        let decides = self.spot_ratio.is_some() && self.on_demand_base.is_some();
        rest.or_else(|| decides.then_some(Policy::DEFAULT)).map(|rest| self.or_default(rest))
    }
}

impl PolicyField {
    /// The fields that decide on a capacity. Every version stores them, and the scripts of a store decide by them. Any
    /// other field that is not stored has its default.
    pub const DECIDING: [Self; 2] = [Self::SpotRatio, Self::OnDemandBase];

    /// The text of this field in a policy that [`Policy::encode`] wrote.
    fn text_in(self, encoded: &str) -> Option<&str> {
        encoded.split(' ').find_map(|pair| pair.strip_prefix(self.key())?.strip_prefix('='))
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The text that [`Policy::encode`] returns, without the fields that are `None`.
impl fmt::Display for PolicyOverrides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for &field in PolicyField::ALL {
            if let Some(value) = self.value(field) {
                write!(f, "{separator}{}={value}", field.key())?;
                separator = " ";
            }
        }
        Ok(())
    }
}

/// The text that [`Policy::encode`] returns.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        PolicyOverrides::from(*self).fmt(f)
    }
}

impl Policy {
    /// The text that a store keeps: `key=value` pairs with a space between them, such as
    /// `spot-ratio=0.7 on-demand-base=2`. A key occurs once; keys and values contain neither spaces nor `=`.
    pub fn encode(&self) -> String {
        self.to_string()
    }

    /// Reads what [`Policy::encode`] writes. Unknown keys are ignored. A field that does not decide on a capacity has its
    /// default if it is missing or invalid.
    ///
    /// # Errors
    /// The spot ratio or the on-demand base is missing or invalid.
    pub fn decode(encoded: &str) -> Result<Self, DecodePolicyError> {
        let (overrides, invalid) = PolicyOverrides::parse(|field| field.text_in(encoded));
        if let Some(invalid) = invalid.into_iter().find(|invalid| PolicyField::DECIDING.contains(&invalid.field)) {
            return Err(invalid.into());
        }
        for field in PolicyField::DECIDING {
            if overrides.value(field).is_none() {
                return Err(DecodePolicyError::Missing(field.key()));
            }
        }
        Ok(overrides.or_default(Self::DEFAULT))
    }
}

/// Why a text from a store is not a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodePolicyError {
    /// The text has no such key.
    #[error("the policy has no {0}")]
    Missing(&'static str),
    /// The value of a known key is invalid.
    #[error("the policy's {}: {}", .0.field.key(), .0)]
    Invalid(#[from] InvalidField),
}

/// A field whose value is invalid. The message says which value and what is accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct InvalidField {
    /// The field.
    pub field: PolicyField,
    /// What is wrong with its value.
    pub cause: InvalidValue,
}

/// A text that is not a whole number in the range of its field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}; accepted: a whole number from 0 to {max}")]
pub struct WholeNumberError {
    text: String,
    what: &'static str,
    max: u32,
}

/// The largest number of executors in a policy. It is far above the size of any job, and far below 2^53, up to which the
/// numbers of Redis scripts are exact.
const MAX_EXECUTORS: u32 = 1_000_000;

/// The longest time in a policy, in seconds: a day.
const MAX_SECONDS: u32 = 86_400;

fn parse_whole_number(text: &str, what: &'static str, max: u32) -> Result<u32, WholeNumberError> {
    let trimmed = text.trim();
    match trimmed.parse() {
        // `u32::from_str` accepts a plus sign; a number of executors has none.
        Ok(number) if number <= max && !trimmed.starts_with('+') => Ok(number),
        _ => Err(WholeNumberError { text: shorten(trimmed), what, max }),
    }
}

fn parse_on_demand_base(text: &str) -> Result<u32, WholeNumberError> {
    parse_whole_number(text, "an on-demand base", MAX_EXECUTORS)
}

fn parse_max_executors_per_node(text: &str) -> Result<u32, WholeNumberError> {
    parse_whole_number(text, "a number of executors", MAX_EXECUTORS)
}

fn parse_seconds(text: &str) -> Result<u32, WholeNumberError> {
    parse_whole_number(text, "a number of seconds", MAX_SECONDS)
}

/// A text that is not a largest share of a pool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a share of a pool; accepted: above 0 and up to 1 such as 0.4, or a percentage such as 40%")]
pub struct MaxPoolShareError(String);

fn parse_max_pool_share(text: &str) -> Result<Ratio, MaxPoolShareError> {
    let share = text.parse().ok().filter(|share| *share != Ratio::ZERO);
    share.ok_or_else(|| MaxPoolShareError(shorten(text.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratio::RatioError;
    use proptest::prelude::*;

    use PolicyField::OnDemandBase;

    fn parse(texts: &[(PolicyField, &'static str)]) -> (PolicyOverrides, Vec<InvalidField>) {
        PolicyOverrides::parse(|field| texts.iter().find(|(other, _)| *other == field).map(|(_, text)| *text))
    }

    /// Other fields have their defaults.
    fn policy(spot_ratio: Ratio, on_demand_base: u32) -> Policy {
        let ratio_only = Policy { spot_ratio: spot_ratio.into(), ..Policy::DEFAULT };
        Policy { on_demand_base, ..ratio_only }
    }

    #[test]
    fn one_invalid_field_does_not_affect_the_others() {
        let (overrides, invalid) = parse(&[(PolicyField::SpotRatio, "lots"), (OnDemandBase, "2")]);
        assert_eq!(overrides, PolicyOverrides { on_demand_base: Some(2), ..PolicyOverrides::default() });
        assert_eq!(invalid.len(), 1);
        assert!(
            matches!(invalid[0].cause, InvalidValue::SpotRatio(SpotRatioError(RatioError::NotARatio(_)))),
            "{invalid:?}"
        );
        let (overrides, invalid) = parse(&[(PolicyField::SpotRatio, "0.7"), (OnDemandBase, "-1")]);
        assert_eq!(overrides.spot_ratio, "0.7".parse().ok());
        assert_eq!(overrides.on_demand_base, None);
        assert_eq!(invalid[0].field, PolicyField::OnDemandBase);
        assert!(invalid[0].to_string().contains("\"-1\""), "{}", invalid[0]);
    }

    #[test]
    fn on_demand_base_is_a_whole_number_within_its_range() {
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
            assert_eq!(parse_on_demand_base(text).ok(), base, "{text:?}");
        }
    }

    #[test]
    fn decode_ignores_unknown_keys_and_reports_missing_and_invalid_ones() {
        let policy = policy("0.7".parse().unwrap(), 2);
        let encoded = policy.encode();
        assert!(encoded.starts_with("spot-ratio=0.7 on-demand-base=2"), "{encoded}");
        assert_eq!(Policy::decode(&format!("pool=a {encoded} x")), Ok(policy));
        assert_eq!(Policy::decode(&format!("{encoded} spot-retry-seconds=soon")), Ok(policy));
        for (part, replacement, error) in [
            ("spot-ratio=", "spot-ratios=", "the policy has no spot-ratio"),
            ("on-demand-base=2", "", "the policy has no on-demand-base"),
            ("base=2", "base=-2", "the policy's on-demand-base: \"-2\" is not an on-demand base"),
            ("ratio=0.7", "ratio=", "the policy's spot-ratio: \"\" is not a ratio"),
        ] {
            let message = Policy::decode(&encoded.replace(part, replacement)).unwrap_err().to_string();
            assert!(message.starts_with(error), "{message}");
        }
    }

    #[test]
    fn keys_labels_and_annotations_are_unique_and_safe() {
        let texts = [PolicyField::key, PolicyField::default_annotation, PolicyField::metric_label];
        for text in texts {
            let all: std::collections::HashSet<_> = PolicyField::ALL.iter().map(|field| text(*field)).collect();
            assert_eq!(all.len(), PolicyField::ALL.len());
            assert!(all.iter().all(|text| !text.contains([' ', '='])), "{all:?}");
        }
    }

    proptest! {
        #[test]
        fn decode_returns_what_encode_wrote(
            billionths in 0..=Ratio::ONE_IN_BILLIONTHS,
            base in 0..=MAX_EXECUTORS,
            is_off: bool,
            max_executors_per_node in 0..3u32,
            spot_retry_seconds in 299..302u32,
        ) {
            let decisive = policy(Ratio::from_billionths(billionths).unwrap(), base);
            let mut policy = Policy { max_executors_per_node, spot_retry_seconds, ..decisive };
            if is_off {
                policy.spot_ratio = SpotRatio::Off;
            }
            prop_assert_eq!(Policy::decode(&policy.encode()), Ok(policy));
        }
    }
}
