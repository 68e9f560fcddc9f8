//! The environment of a container, and its `$(NAME)` in other texts, as Kubernetes has them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::EnvVar;
use serde_json::Value;

/// The variables of a container over those of its image.
pub(crate) type Variables = BTreeMap<String, String>;

/// Adds a container's variables, in their order: each may name those before it, and fields of its pod.
pub(crate) fn add(variables: &mut Variables, of_container: &[EnvVar], pod: &Value) -> Result<()> {
    for variable in of_container {
        let value = match &variable.value_from {
            None => expand(variable.value.as_deref().unwrap_or_default(), variables),
            Some(source) => {
                let field = source.field_ref.as_ref().with_context(|| {
                    format!("the variable {} is not from a field of the pod; nothing else is simulated", variable.name)
                })?;
                pod_field(pod, &field.field_path).with_context(|| format!("the variable {}", variable.name))?
            }
        };
        variables.insert(variable.name.clone(), value);
    }
    Ok(())
}

/// The text with the values of the variables that it names; `$$` is a dollar, and a name that nobody has stays.
pub(crate) fn expand(text: &str, variables: &Variables) -> String {
    let (mut expanded, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        rest = if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            after
        } else if let Some((name, after)) = after.strip_prefix('(').and_then(|name| name.split_once(')')) {
            match variables.get(name) {
                Some(value) => expanded.push_str(value),
                None => expanded.extend(["$(", name, ")"]),
            }
            after
        } else {
            expanded.push('$');
            after
        };
    }
    expanded + rest
}

/// A field such as `status.podIP`.
fn pod_field(pod: &Value, path: &str) -> Result<String> {
    ensure!(!path.contains('['), "{path}: labels and annotations are not simulated");
    let value = pod.pointer(&format!("/{}", path.replace('.', "/")));
    Ok(value.and_then(Value::as_str).with_context(|| format!("the pod has no {path}"))?.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn known() -> Variables {
        Variables::from([("ID".to_owned(), "7".to_owned())])
    }

    #[test]
    fn names_are_expanded_as_kubernetes_does() {
        for (text, expanded) in [
            ("exec-$(ID)", "exec-7"),
            ("$(ID)$(ID)", "77"),
            ("$(NOBODY)-$(ID)", "$(NOBODY)-7"),
            ("$$(ID)", "$(ID)"),
            ("$ID costs 5$", "$ID costs 5$"),
            ("$(ID", "$(ID"),
        ] {
            assert_eq!(expand(text, &known()), expanded, "{text}");
        }
    }

    #[test]
    fn variables_come_from_those_before_them_and_from_the_pod() -> Result<()> {
        let of_container: Vec<EnvVar> = serde_json::from_value(json!([
            {"name": "URL", "value": "spark://$(ID)"},
            {"name": "AGAIN", "value": "$(URL)/$(LATER)"},
            {"name": "LATER", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ]))?;
        let mut variables = known();
        add(&mut variables, &of_container, &json!({"status": {"podIP": "127.0.0.9"}}))?;
        let value = |name: &str| variables.get(name).cloned().unwrap_or_default();
        assert_eq!(["URL", "AGAIN", "LATER"].map(value), ["spark://7", "spark://7/$(LATER)", "127.0.0.9"]);
        let error = add(&mut variables, &of_container, &json!({})).err().context("it was found")?;
        assert!(format!("{error:#}").contains("LATER: the pod has no status.podIP"), "{error:#}");
        Ok(())
    }
}
