//! Which proxy leads to a cluster, by kubectl's rules.

use std::net::IpAddr;

use anyhow::anyhow;
use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;

/// The proxy for a cluster at this address. `stated` is the kubeconfig's `proxy-url`, which holds whatever the environment
/// says; `variable` returns a variable of the environment.
///
/// # Errors
/// The proxy that is set is none.
pub(crate) fn proxy(
    stated: Option<&str>,
    cluster: &Uri,
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Option<Uri>> {
    let variable = |name: &str| {
        let set = [name.to_owned(), name.to_lowercase()].into_iter().filter_map(|name| variable(&name));
        set.map(|value| value.trim().to_owned()).find(|value| !value.is_empty())
    };
    if let Some(url) = stated.map(str::trim).filter(|url| !url.is_empty()) {
        return parse("the proxy-url of the kubeconfig", url).map(Some);
    }
    let name = if cluster.scheme_str() == Some("http") { "HTTP_PROXY" } else { "HTTPS_PROXY" };
    let Some(url) = variable(name).filter(|_| !is_this_machine(cluster)) else { return Ok(None) };
    let exceptions = variable("NO_PROXY").unwrap_or_default();
    // Which proxy it is does not matter to the matcher, to which `*` does not mean an address.
    let matcher = Matcher::builder().all("http://proxy").no(exceptions.as_str()).build();
    if exceptions.split(',').any(|exception| exception.trim() == "*") || matcher.intercept(cluster).is_none() {
        return Ok(None);
    }
    parse(name, &url).map(Some)
}

fn is_this_machine(cluster: &Uri) -> bool {
    let host = cluster.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

fn parse(setting: &str, url: &str) -> anyhow::Result<Uri> {
    let with_scheme = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let is_proxy = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https" | "socks5")) && uri.host().is_some();
    with_scheme.parse().ok().filter(is_proxy).ok_or_else(|| {
        // What comes before it may be a password.
        let shown = url.rsplit('@').next().unwrap_or_default();
        anyhow!(
            "{setting} is no address of a proxy: {shown:?}; accepted: http, https or socks5, as in http://proxy:3128"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(stated: Option<&str>, cluster: &str, environment: &[(&str, &str)]) -> Result<Option<String>, String> {
        let variable = |name: &str| {
            let (_, value) = environment.iter().find(|(known, _)| *known == name)?;
            Some((*value).to_owned())
        };
        let proxy = proxy(stated, &cluster.parse().expect("an address"), variable);
        proxy.map(|proxy| proxy.map(|uri| uri.to_string())).map_err(|error| error.to_string())
    }

    #[test]
    fn the_environment_has_a_proxy_unless_the_kubeconfig_states_one() {
        let environment = [("HTTPS_PROXY", "http://proxy:3128"), ("NO_PROXY", "stated,cluster")];
        assert_eq!(of(None, "https://elsewhere", &environment), Ok(Some("http://proxy:3128/".into())));
        // Neither the exceptions of the environment nor the host of the proxy matter to it.
        let stated = of(Some("socks5://stated:1080"), "https://cluster", &environment);
        assert_eq!(stated, Ok(Some("socks5://stated:1080/".into())));
        assert_eq!(of(Some(" "), "https://cluster", &[]), Ok(None));
    }

    #[test]
    fn the_exceptions_are_about_the_cluster_and_this_machine_is_always_one() {
        for (cluster, exceptions, has_proxy) in [
            ("https://api.corp.example", "", true),
            ("https://api.corp.example", ".corp.example", false),
            ("https://api.other.example", "proxy", true),
            ("https://10.1.2.3:6443", "10.0.0.0/8", false),
            ("https://10.1.2.3:6443", "*", false),
            ("https://127.0.0.1:6443", "", false),
            ("https://localhost:6443", "", false),
            ("https://[::1]:6443", "", false),
            ("http://api.corp.example", "", false),
        ] {
            let environment = [("https_proxy", "proxy:3128"), ("no_proxy", exceptions)];
            let expected = has_proxy.then(|| "http://proxy:3128/".to_owned());
            assert_eq!(of(None, cluster, &environment), Ok(expected), "{cluster} {exceptions}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_an_error_that_names_the_setting_and_shows_no_password() {
        let error = of(Some("ftp://me:secret@proxy"), "https://cluster", &[]).expect_err("no proxy");
        assert!(error.starts_with("the proxy-url of the kubeconfig is no address of a proxy: \"proxy\""), "{error}");
        let error = of(None, "https://cluster", &[("HTTPS_PROXY", "socks4://proxy")]).expect_err("no proxy");
        assert!(error.starts_with("HTTPS_PROXY is no") && error.contains("accepted: http, https or socks5"), "{error}");
    }
}
