//! Which names Kubernetes accepts: DNS labels, DNS subdomains, label values and label keys.
//!
//! See <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/> and
//! <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>.

/// The most bytes of a DNS label, of a label value, and of the name in a label key.
const MAX_LABEL: usize = 63;
/// The most bytes of a DNS subdomain.
const MAX_SUBDOMAIN: usize = 253;

/// Whether this is a DNS label (RFC 1123), which the name of a namespace has to be: 1 to 63 of a-z, 0-9 and `-`, and
/// no `-` at either end.
pub fn is_dns_label(name: &str) -> bool {
    name.len() <= MAX_LABEL && is_label_of_any_length(name)
}

/// Whether this is a DNS subdomain (RFC 1123), which the names of most objects have to be: 1 to 253 of a-z, 0-9, `-`
/// and `.`, and neither `-` nor `.` at either end or next to a `.`.
pub fn is_dns_subdomain(name: &str) -> bool {
    // The Kubernetes API limits the length of the whole, and not of each part.
    name.len() <= MAX_SUBDOMAIN && name.split('.').all(is_label_of_any_length)
}

/// Whether this is the value of a label, and not empty: 1 to 63 letters, digits, `-`, `_` and `.`, with a letter or a
/// digit at both ends.
pub fn is_label_value(value: &str) -> bool {
    value.len() <= MAX_LABEL
        && has_alphanumeric_ends(value)
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Whether this is the key of a label or an annotation: `name` or `prefix/name`.
pub fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_label_value(name),
        None => is_label_value(key),
    }
}

fn is_label_of_any_length(name: &str) -> bool {
    has_alphanumeric_ends(name) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn has_alphanumeric_ends(text: &str) -> bool {
    let bytes = text.as_bytes();
    [bytes.first(), bytes.last()].iter().all(|b| b.is_some_and(u8::is_ascii_alphanumeric))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(is_accepted: fn(&str) -> bool, accepted: &[&str], rejected: &[&str]) {
        accepted.iter().for_each(|name| assert!(is_accepted(name), "{name:?} is rejected"));
        rejected.iter().for_each(|name| assert!(!is_accepted(name), "{name:?} is accepted"));
    }

    #[test]
    fn dns_labels() {
        check(
            is_dns_label,
            &["a", "0", "etl-2", &"a".repeat(63)],
            &["", "Etl", "a_b", "a.b", "-a", "a-", &"a".repeat(64)],
        );
    }

    #[test]
    fn dns_subdomains() {
        let accepted = ["a", "spot-balancer-reconciler", "a.b", &"a".repeat(253)];
        check(is_dns_subdomain, &accepted, &["", "A", "a..b", "-a", "a-.b", ".a", "a.", &"a".repeat(254)]);
    }

    #[test]
    fn label_values() {
        let rejected = ["", "-a", "a-", "_a", "a_", ".a", "a.", "-", "a b", " a", "a\n", "a/b", "é", &"a".repeat(64)];
        check(is_label_value, &["driver", "A", "0", "A_b.c", "a--b", &"a".repeat(63)], &rejected);
    }

    #[test]
    fn label_keys() {
        let rejected = ["", "/", "a/", "/a", "a/b/c", "-a", "a-", "Upper.io/x", "a b", "é", "x..y/z", &"a".repeat(64)];
        check(is_label_key, &["spark-role", "karpenter.sh/capacity-type", "a", "A_b.c", "x.y-z.io/N"], &rejected);
    }
}
