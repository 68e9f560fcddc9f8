{{- define "spot-balancer.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Refuses the values of an older chart. helm upgrade --reuse-values has them without the defaults of this chart. */}}
{{- define "spot-balancer.refuseOlderValues" -}}
{{- $missing := list -}}
{{- range $name := list "admissionToken" "clientCertificates" "helmTest" }}
{{- if not (index $.Values $name) }}{{ $missing = append $missing $name }}{{ end }}
{{- end }}
{{- if not .Values.settings.maxNewJobsPerMinute }}{{ $missing = append $missing "settings.maxNewJobsPerMinute" }}{{ end }}
{{- if not .Values.settings.capacityProfile }}{{ $missing = append $missing "settings.capacityProfile" }}{{ end }}
{{- if not .Values.redis.mode }}{{ $missing = append $missing "redis.mode" }}{{ end }}
{{- if kindIs "invalid" .Values.settings.maxPoolShare }}{{ $missing = append $missing "settings.maxPoolShare" }}{{ end }}
{{- if not .Values.admission.deletionTimeoutSeconds }}{{ $missing = append $missing "admission.deletionTimeoutSeconds" }}{{ end }}
{{- with $missing }}
{{- fail (printf "\n\nThese values have neither a value nor a default: %s. They are newer than the release that helm upgrade --reuse-values takes the values from. Use --reset-then-reuse-values, or pass your own values with --values." (join ", " .)) }}
{{- end }}
{{- end }}

{{/* Refuses a release without the values that have no default. */}}
{{- define "spot-balancer.refuseMissingValues" -}}
{{- if not .Values.image.repository }}
{{- fail "\n\nimage.repository is empty, because no image of Spot Balancer is published. Build it and push it to a registry of yours, as docs/install.md says, and set image.repository to its name there, such as registry.example.com/spot-balancer." }}
{{- end }}
{{- $ways := list }}
{{- if .Values.namespaces.names }}{{ $ways = append $ways "namespaces.names" }}{{ end }}
{{- with .Values.namespaces.selector }}
{{- $ways = append $ways "namespaces.selector" }}
{{- if not (or .matchLabels .matchExpressions) }}
{{- fail "\n\nnamespaces.selector has neither labels nor expressions, so it would select all namespaces. Add a label under matchLabels, such as {matchLabels: {spark: \"true\"}}; or set namespaces.all to true instead." }}
{{- end }}
{{- end }}
{{- if .Values.namespaces.all }}{{ $ways = append $ways "namespaces.all" }}{{ end }}
{{- if not $ways }}
{{- fail "\n\nNo namespaces are chosen, and Spot Balancer changes the Spark pods of chosen namespaces only. Set namespaces.names to the namespaces of your jobs, such as --set namespaces.names={spark-jobs}; or namespaces.selector to a label of theirs; or namespaces.all to true." }}
{{- end }}
{{- if gt (len $ways) 1 }}
{{- fail (printf "\n\n%s are both set. Set only one of them." (join " and " (slice $ways 0 2))) }}
{{- end }}
{{- end }}

{{/* Short enough that names with a suffix such as "-reconciler-metrics" stay valid. Each template needs a name before any
newer value, so older and missing values are refused here: Helm renders refusals.yaml after the others. */}}
{{- define "spot-balancer.fullname" -}}
{{- include "spot-balancer.refuseOlderValues" . -}}
{{- include "spot-balancer.refuseMissingValues" . -}}
{{- $name := include "spot-balancer.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 43 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 43 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 43 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The labels that select the pods and the objects of a component: (list $ "webhook") */}}
{{- define "spot-balancer.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "spot-balancer.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/*
The labels of an object: (list $ "webhook"), and optionally labels of that object alone. commonLabels override the
chart's labels, except the labels of the selector.
*/}}
{{- define "spot-balancer.labels" -}}
{{- $root := index . 0 -}}
{{- $own := gt (len .) 2 | ternary (last .) dict -}}
{{- $ours := dict
  "app.kubernetes.io/part-of" "spot-balancer"
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name ($root.Chart.Version | replace "+" "_")) -}}
{{- merge (include "spot-balancer.selector" . | fromYaml) (deepCopy $own) (deepCopy $root.Values.commonLabels) $ours | toYaml }}
{{- end }}

{{/*
The labels of pods: (list $ "webhook"), and optionally labels of these pods alone. None of the chart's changes with its
version, so an upgrade does not restart pods.
*/}}
{{- define "spot-balancer.podLabels" -}}
{{- $root := index . 0 -}}
{{- $own := gt (len .) 2 | ternary (last .) dict -}}
{{- $ours := dict "app.kubernetes.io/part-of" "spot-balancer" -}}
{{- merge (include "spot-balancer.selector" . | fromYaml) (deepCopy $own) (deepCopy $root.Values.commonLabels) $ours | toYaml }}
{{- end }}

{{/* The metadata of an object in this namespace: (list $ "webhook" "name"), and optionally labels of its own */}}
{{- define "spot-balancer.metadata" -}}
{{- $root := index . 0 -}}
name: {{ index . 2 | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "spot-balancer.labels" (list $root (index . 1) (gt (len .) 3 | ternary (last .) dict)) | nindent 2 }}
{{- end }}

{{/* The metadata of a cluster-wide object: (list $ "webhook" "name") */}}
{{- define "spot-balancer.clusterMetadata" -}}
name: {{ index . 2 | quote }}
labels:
  {{- include "spot-balancer.labels" (list (index . 0) (index . 1)) | nindent 2 }}
{{- end }}

{{- define "spot-balancer.webhook" -}}
{{ include "spot-balancer.fullname" . }}-webhook
{{- end }}

{{- define "spot-balancer.reconciler" -}}
{{ include "spot-balancer.fullname" . }}-reconciler
{{- end }}

{{- define "spot-balancer.redis" -}}
{{ include "spot-balancer.fullname" . }}-redis
{{- end }}

{{/* An image reference: (list image "default tag") */}}
{{- define "spot-balancer.image" -}}
{{- $image := index . 0 -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default (index . 1) }}{{ end }}
{{- end }}

{{/* Where the reconciler runs: deployment, webhook or none */}}
{{- define "spot-balancer.reconcilerMode" -}}
{{- .Values.reconciler.mode | default (eq .Values.store "memory" | ternary "webhook" "deployment") }}
{{- end }}

{{/* Not empty if the bundled Redis is used. */}}
{{- define "spot-balancer.redisIsBundled" -}}
{{- if and (eq .Values.store "redis") (not .Values.redis.url) (not .Values.redis.existingSecret.name) }}yes{{ end }}
{{- end }}

{{/* The memory store belongs to one process, so it allows one replica. */}}
{{- define "spot-balancer.webhookReplicas" -}}
{{- eq .Values.store "memory" | ternary 1 .Values.webhook.replicas }}
{{- end }}

{{/* Each source has a Secret of its own, so that a change of source does not reuse or overwrite the other's. */}}
{{- define "spot-balancer.tlsSecret" -}}
{{- if eq .Values.certificates.source "secret" }}
{{- .Values.certificates.secret.name }}
{{- else if eq .Values.certificates.source "helm" }}
{{- include "spot-balancer.webhook" . }}-helm-tls
{{- else }}
{{- include "spot-balancer.webhook" . }}-tls
{{- end }}
{{- end }}

{{/* The Secret with the admission tokens. */}}
{{- define "spot-balancer.tokenSecret" -}}
{{- .Values.admissionToken.existingSecret.name | default (printf "%s-token" (include "spot-balancer.webhook" .)) }}
{{- end }}

{{/* The seconds of a duration such as 2160h or 1h30m. */}}
{{- define "spot-balancer.seconds" -}}
{{- $hours := regexFind "[0-9]+h" . | trimSuffix "h" | atoi -}}
{{- $minutes := regexFind "[0-9]+m" . | trimSuffix "m" | atoi -}}
{{- add (mul 3600 $hours) (mul 60 $minutes) (regexFind "[0-9]+s" . | trimSuffix "s" | atoi) }}
{{- end }}

{{/* The Secret with the password of the bundled Redis. */}}
{{- define "spot-balancer.redisPasswordSecret" -}}
{{- .Values.redis.bundled.existingSecret | default (printf "%s-password" (include "spot-balancer.redis" .)) }}
{{- end }}

{{/* The password that the chart makes for its Redis, in base64. All templates of one rendering get the same one. */}}
{{- define "spot-balancer.redisNewPassword" -}}
{{- $bundled := .Values.redis.bundled -}}
{{- if not (hasKey $bundled "password") -}}
{{- $secret := lookup "v1" "Secret" .Release.Namespace (include "spot-balancer.redisPasswordSecret" .) -}}
{{- $password := index ($secret.data | default dict) "password" -}}
{{- if not $password -}}
{{- /* Without a cluster, as in helm template and in Argo CD, lookup finds nothing. */ -}}
{{- if not (or $bundled.renderNew (lookup "v1" "Namespace" "" "kube-system")) -}}
{{- fail "\n\nThe chart makes a password for its Redis, and Helm has no access to the cluster, so each rendering would have a new one. Set redis.bundled.existingSecret to a Secret of yours with the key password, or use your own Redis (redis.url or redis.existingSecret.name). If you keep what is rendered and apply it again and again, set redis.bundled.renderNew to true. In a dry run of helm install, use --dry-run=server." -}}
{{- end -}}
{{- $password = randAlphaNum 40 | b64enc -}}
{{- end -}}
{{- $_ := set $bundled "password" $password -}}
{{- end -}}
{{- $bundled.password }}
{{- end }}

{{/* Pods read the password at startup only. The checksum restarts them when a new one is made, or an older one comes back
by helm rollback. A password of your own may be guessable from a checksum, so it has none. */}}
{{- define "spot-balancer.redisPasswordChecksum" -}}
{{- if and (include "spot-balancer.redisIsBundled" .) (not .Values.redis.bundled.existingSecret) -}}
checksum/redis: {{ include "spot-balancer.redisNewPassword" . | sha256sum }}
{{- end }}
{{- end }}

{{/* The keys and commands that webhook and reconciler use, as an ACL rule. */}}
{{- define "spot-balancer.redisRights" -}}
~exec-* +@connection +evalsha +script|load +@hash +get +set +del +unlink +pexpire +scan +time +scard +sadd +spop +role +info +cluster|slots +cluster|info +asking
{{- end }}

{{/* The password of the bundled Redis as an environment variable. The kubelet puts it where $(REDIS_PASSWORD) stands. */}}
{{- define "spot-balancer.redisPassword" -}}
- name: REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "spot-balancer.redisPasswordSecret" . | quote }}, key: password}}
{{- end }}

{{/* The store that webhook and reconciler share. */}}
{{- define "spot-balancer.storeEnvironment" -}}
{{- $settings := .Values.settings -}}
- name: STORE
  value: {{ .Values.store | quote }}
{{- if eq .Values.store "redis" }}
{{- if include "spot-balancer.redisIsBundled" . }}
{{ include "spot-balancer.redisPassword" . }}
{{- end }}
- name: REDIS_URL
  {{- if include "spot-balancer.redisIsBundled" . }}
  value: redis://balancer:$(REDIS_PASSWORD)@{{ include "spot-balancer.redis" . }}.{{ .Release.Namespace }}.svc:{{ int .Values.redis.bundled.port }}
  {{- else if .Values.redis.url }}
  valueFrom: {secretKeyRef: {name: {{ include "spot-balancer.redis" . | quote }}, key: url}}
  {{- else }}
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.existingSecret.name | quote }}, key: {{ .Values.redis.existingSecret.key | quote }}}}
  {{- end }}
- name: REDIS_MODE
  value: {{ .Values.redis.mode | quote }}
{{- if .Values.redis.passwordSecret.name }}
- name: REDIS_PASSWORD_FILE
  value: /redis-password/password
{{- end }}
{{- with .Values.redis.sentinel }}
{{- if .master }}
- name: REDIS_SENTINEL_MASTER
  value: {{ .master | quote }}
{{- end }}
{{- if .username }}
- name: REDIS_SENTINEL_USERNAME
  value: {{ .username | quote }}
{{- end }}
{{- if .passwordSecret.name }}
- name: REDIS_SENTINEL_PASSWORD_FILE
  value: /redis-sentinel-password/password
{{- end }}
{{- end }}
{{- with .Values.redis.awsIam }}
{{- if .service }}
- name: REDIS_AWS_IAM
  value: {{ .service | quote }}
- name: REDIS_AWS_CACHE_NAME
  value: {{ .cacheName | quote }}
{{- if .region }}
- name: AWS_REGION
  value: {{ .region | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- if or .Values.redis.ca .Values.redis.caSecret.name }}
- name: SSL_CERT_FILE
  value: /redis-ca/ca.crt
{{- end }}
{{- end }}
- name: STORE_TIMEOUT_MILLISECONDS
  value: {{ int64 $settings.storeTimeoutMilliseconds | quote }}
- name: REDIS_DEFAULT_TTL_SECONDS
  value: {{ int64 $settings.redisDefaultTtlSeconds | quote }}
{{- end }}

{{/* What all programs of a release must agree on, those of helm test too. */}}
{{- define "spot-balancer.conventionEnvironment" -}}
{{- $settings := .Values.settings -}}
- name: DEFAULT_SPOT_RATIO
  value: {{ $settings.defaultSpotRatio | quote }}
- name: SPOT_PREFERENCE
  value: {{ $settings.spotPreference | quote }}
- name: CAPACITY_PROFILE
  value: {{ $settings.capacityProfile | quote }}
{{- with $settings.capacityTypeLabel }}
- name: CAPACITY_TYPE_LABEL
  value: {{ . | quote }}
{{- end }}
{{- with $settings.spotValues }}
- name: SPOT_VALUES
  value: {{ join "," . | quote }}
{{- end }}
{{- /* An empty list is a value: every node that is not spot, and no tolerations. */}}
{{- if not (kindIs "invalid" $settings.onDemandValues) }}
- name: ON_DEMAND_VALUES
  value: {{ join "," $settings.onDemandValues | quote }}
{{- end }}
{{- if not (kindIs "invalid" $settings.spotTolerations) }}
- name: SPOT_TOLERATIONS
  value: {{ join "," $settings.spotTolerations | quote }}
{{- end }}
- name: DRIVER_CAPACITY
  value: {{ $settings.driverCapacity | quote }}
- name: PROTECT_DRIVERS
  value: {{ $settings.protectDrivers | quote }}
- name: SPOT_FALLBACK_SECONDS
  value: {{ int64 $settings.spotFallbackSeconds | quote }}
- name: SPOT_RETRY_SECONDS
  value: {{ int64 $settings.spotRetrySeconds | quote }}
- name: MAX_EXECUTORS_PER_NODE
  value: {{ int64 $settings.maxExecutorsPerNode | quote }}
- name: MAX_POOL_SHARE
  value: {{ $settings.maxPoolShare | quote }}
- name: WORKLOAD_ROLE_LABEL
  value: {{ $settings.workloadRoleLabel | quote }}
- name: DRIVER_ROLE_VALUE
  value: {{ include "spot-balancer.driverRoles" . | fromJsonArray | join "," | quote }}
- name: EXECUTOR_ROLE_VALUE
  value: {{ $settings.executorRoleValue | quote }}
- name: JOB_ID_LABEL
  value: {{ join "," $settings.jobIdLabel | quote }}
- name: SPOT_RATIO_ANNOTATION
  value: {{ $settings.spotRatioAnnotation | quote }}
- name: ON_DEMAND_BASE_ANNOTATION
  value: {{ $settings.onDemandBaseAnnotation | quote }}
- name: DECISION_ANNOTATION
  value: {{ $settings.decisionAnnotation | quote }}
- name: NODE_ROLE_SELECTOR
  value: {{ $settings.nodeRoleSelector | quote }}
- name: LOG_LEVEL
  value: {{ $settings.logLevel | quote }}
- name: LOG_FORMAT
  value: {{ $settings.logFormat | quote }}
{{- end }}

{{/* The settings of the reconciler, in its own Deployment or in the webhook. */}}
{{- define "spot-balancer.reconcileEnvironment" -}}
- name: RECONCILE_INTERVAL_SECONDS
  value: {{ int64 .Values.settings.reconcileIntervalSeconds | quote }}
- name: RECONCILE_GRACE_SECONDS
  value: {{ int64 .Values.settings.reconcileGraceSeconds | quote }}
- name: RECONCILE_LEASE
  value: {{ include "spot-balancer.reconciler" . | quote }}
{{- with .Values.namespaces.names }}
- name: WATCH_NAMESPACES
  value: {{ join "," . | quote }}
{{- end }}
{{- end }}

{{/* The values of the role label on drivers, as a JSON list. One value may also be given as a text. */}}
{{- define "spot-balancer.driverRoles" -}}
{{- $roles := .Values.settings.driverRoleValue -}}
{{- kindIs "string" $roles | ternary (list $roles) $roles | toJson }}
{{- end }}

{{/* All that the chart sets in the webhook's container. */}}
{{- define "spot-balancer.webhookEnvironment" -}}
{{- $mode := include "spot-balancer.reconcilerMode" . -}}
{{ include "spot-balancer.storeEnvironment" . }}
{{ include "spot-balancer.conventionEnvironment" . }}
- name: WEBHOOK_TIMEOUT_SECONDS
  value: {{ int .Values.settings.webhookTimeoutSeconds | quote }}
- name: MAX_NEW_JOBS_PER_MINUTE
  value: {{ int .Values.settings.maxNewJobsPerMinute | quote }}
- name: PORT
  value: {{ int .Values.webhook.port | quote }}
- name: ADMIN_PORT
  value: {{ int .Values.webhook.adminPort | quote }}
- name: TLS_CERT_PATH
  value: {{ printf "%s/%s" .Values.certificates.mountPath .Values.certificates.certificateKey | quote }}
- name: TLS_KEY_PATH
  value: {{ printf "%s/%s" .Values.certificates.mountPath .Values.certificates.privateKeyKey | quote }}
{{- if .Values.admissionToken.enabled }}
- name: ADMISSION_TOKEN_PATH
  value: /admission-token/tokens
{{- end }}
{{- if .Values.clientCertificates.caSecret }}
- name: CLIENT_CA_PATH
  value: /client-ca/ca.crt
{{- end }}
- name: RECONCILE_ENABLED
  value: {{ eq $mode "webhook" | quote }}
{{- if eq $mode "webhook" }}
{{ include "spot-balancer.reconcileEnvironment" . }}
{{- end }}
{{- end }}

{{/* All that the chart sets in the reconciler's container. */}}
{{- define "spot-balancer.reconcilerEnvironment" -}}
{{ include "spot-balancer.storeEnvironment" . }}
{{ include "spot-balancer.conventionEnvironment" . }}
{{ include "spot-balancer.reconcileEnvironment" . }}
- name: ADMIN_PORT
  value: {{ int .Values.reconciler.adminPort | quote }}
- name: PAGE_PORT
  value: {{ int .Values.reconciler.pagePort | quote }}
{{- end }}

{{/*
How nodes state their capacity on each platform: the programs' own table (crates/balancer-core), for the pods of this
release. `on-demand: []` means every node that is not spot. `also-spot`: other labels that mark a spot node.
*/}}
{{- define "spot-balancer.profiles" -}}
karpenter: {label: karpenter.sh/capacity-type, spot: [spot], on-demand: [on-demand], also-spot: {karpenter.k8s.aws/capacity-reservation-interruptible: "true", eks.amazonaws.com/capacity-reservation-interruptible: "true"}}
eks: {label: eks.amazonaws.com/capacityType, spot: [SPOT], on-demand: [ON_DEMAND]}
gke: {label: cloud.google.com/gke-spot, spot: ["true"], on-demand: [], also-spot: {cloud.google.com/gke-preemptible: "true"}}
aks: {label: kubernetes.azure.com/scalesetpriority, spot: [spot], on-demand: [], also-spot: {kubernetes.azure.com/priority: spot}}
openshift: {label: machine.openshift.io/interruptible-instance, spot: ["*"], on-demand: []}
oke: {label: oci.oraclecloud.com/oke-is-preemptible, spot: ["true"], on-demand: []}
ack: {label: node.alibabacloud.com/spot-strategy, spot: [SpotAsPriceGo, SpotWithPriceLimit], on-demand: []}
ocean: {label: spotinst.io/node-lifecycle, spot: [spot], on-demand: [od]}
cast-ai: {label: scheduling.cast.ai/spot, spot: ["true"], on-demand: []}
{{- end }}

{{/* How nodes state their capacity in this release, as JSON: the profile, as far as no setting replaces it. */}}
{{- define "spot-balancer.capacityLabels" -}}
{{- $settings := .Values.settings -}}
{{- $labels := index (include "spot-balancer.profiles" . | fromYaml) $settings.capacityProfile -}}
{{- $onDemand := kindIs "invalid" $settings.onDemandValues | ternary (index $labels "on-demand") $settings.onDemandValues -}}
{{- $_ := set $labels "profile-label" $labels.label -}}
{{- $_ := set $labels "label" ($settings.capacityTypeLabel | default $labels.label) -}}
{{- $_ := set $labels "spot" ($settings.spotValues | default $labels.spot) -}}
{{- $_ := set $labels "on-demand" $onDemand -}}
{{- $labels | toJson }}
{{- end }}

{{/* The requirements on the labels of an on-demand node, as a JSON list. */}}
{{- define "spot-balancer.onDemandRequirements" -}}
{{- $labels := include "spot-balancer.capacityLabels" . | fromJson -}}
{{- $label := $labels.label -}}
{{- $spot := $labels.spot -}}
{{- $onDemand := index $labels "on-demand" -}}
{{- $requirements := list -}}
{{- if $onDemand -}}
{{- $requirements = append $requirements (dict "key" $label "operator" "In" "values" $onDemand) -}}
{{- else if has "*" $spot -}}
{{- $requirements = append $requirements (dict "key" $label "operator" "DoesNotExist") -}}
{{- else -}}
{{- $requirements = append $requirements (dict "key" $label "operator" "NotIn" "values" $spot) -}}
{{- end -}}
{{- /* With one value, the main label leaves the others out too. With a label of one's own, they may be missing. */ -}}
{{- if and (ne (len $onDemand) 1) (eq $label (index $labels "profile-label")) -}}
{{- range $key, $value := index $labels "also-spot" -}}
{{- $requirements = append $requirements (dict "key" $key "operator" "NotIn" "values" (list $value)) -}}
{{- end -}}
{{- end -}}
{{- $requirements | toJson }}
{{- end }}

{{- define "spot-balancer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "spot-balancer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The scheduling of a component's pods: (list $ "webhook"). A component's own placement replaces the common one part by
part. */}}
{{- define "spot-balancer.placement" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $placement := merge dict $root.Values.placement -}}
{{- range $part, $value := (index $root.Values $component | default dict).placement }}
{{- $_ := set $placement $part $value }}
{{- end }}
{{- with $placement.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $placement.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $placement.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- /* Only these two have replicas. */}}
{{- $apart := and (has $component (list "webhook" "reconciler")) (ne $placement.antiAffinity "none") }}
{{- if $placement.affinity }}
affinity:
  {{- toYaml $placement.affinity | nindent 2 }}
{{- else if or $apart (ne $placement.onDemand "any") }}
affinity:
  {{- $term := dict "matchExpressions" (include "spot-balancer.onDemandRequirements" $root | fromJsonArray) }}
  {{- if eq $placement.onDemand "required" }}
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        {{- list $term | toYaml | nindent 8 }}
  {{- else if eq $placement.onDemand "preferred" }}
  nodeAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      {{- list (dict "weight" 100 "preference" $term) | toYaml | nindent 6 }}
  {{- end }}
  {{- if $apart }}
  {{- $others := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "spot-balancer.selector" (list $root $component) | fromYaml)) }}
  {{- /* The new replicas of a rollout keep apart from each other, not from the old ones. */}}
  {{- if semverCompare ">=1.31-0" $root.Capabilities.KubeVersion.Version }}
  {{- $_ := set $others "matchLabelKeys" (list "pod-template-hash") }}
  {{- end }}
  podAntiAffinity:
    {{- if eq $placement.antiAffinity "required" }}
    requiredDuringSchedulingIgnoredDuringExecution:
      {{- list $others | toYaml | nindent 6 }}
    {{- else }}
    preferredDuringSchedulingIgnoredDuringExecution:
      {{- list (dict "weight" 100 "podAffinityTerm" $others) | toYaml | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: {{ $placement.spread }}
    {{- if semverCompare ">=1.27-0" $root.Capabilities.KubeVersion.Version }}
    # Spread the new replicas of a rollout on their own, without counting the old ones.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
    labelSelector:
      matchLabels:
        {{- include "spot-balancer.selector" (list $root (index $ 1)) | nindent 8 }}
  {{- end }}
{{- end }}

{{/* Probes on the container's port "admin". */}}
{{- define "spot-balancer.probes" -}}
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* The PodDisruptionBudget of a component: (list $ "webhook" replicas) */}}
{{- define "spot-balancer.podDisruptionBudget" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $budget := (index $root.Values $component).podDisruptionBudget -}}
{{- if and $budget.enabled (gt (int (index . 2)) 1) -}}
# policy/v1 exists from Kubernetes 1.21 on.
apiVersion: {{ $root.Capabilities.APIVersions.Has "policy/v1" | ternary "policy/v1" "policy/v1beta1" }}
kind: PodDisruptionBudget
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (include (printf "spot-balancer.%s" $component) $root)) | nindent 2 }}
spec:
  maxUnavailable: {{ $budget.maxUnavailable }}
  {{- if semverCompare ">=1.27-0" $root.Capabilities.KubeVersion.Version }}
  # A pod that is not ready serves no requests, so it must not block the drain of its node.
  unhealthyPodEvictionPolicy: AlwaysAllow
  {{- end }}
  selector:
    matchLabels:
      {{- include "spot-balancer.selector" (list $root $component) | nindent 6 }}
{{- end }}
{{- end }}

{{- define "spot-balancer.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (include (printf "spot-balancer.%s" $component) $root)) | nindent 2 }}
  {{- with (index $root.Values $component).serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# Each pod mounts the token on its own.
automountServiceAccountToken: false
{{- end }}

{{/* Binds a ClusterRole to a component's ServiceAccount in the namespaces of jobs: (list $ "webhook" "role") */}}
{{- define "spot-balancer.bindWhereJobsRun" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $role := index . 2 -}}
{{- $labels := include "spot-balancer.labels" (list $root $component) -}}
{{- $account := include (printf "spot-balancer.%s" $component) $root -}}
{{- if $root.Values.namespaces.names }}
{{- range $root.Values.namespaces.names }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $role | quote }}
  namespace: {{ . | quote }}
  labels:
    {{- $labels | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {{ $role | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ $account | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}
{{- else }}
---
{{ include "spot-balancer.bindEverywhere" . }}
{{- end }}
{{- end }}

{{- define "spot-balancer.bindEverywhere" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $role := index . 2 -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component $role) | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {{ $role | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ include (printf "spot-balancer.%s" $component) $root | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}

{{/* The rights of the reconciler, for the component that it runs in. */}}
{{- define "spot-balancer.reconcileRights" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $account := include (printf "spot-balancer.%s" $component) $root -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component (printf "%s-reconcile" $account)) | nindent 2 }}
rules:
  # Live executors, and the annotations of their drivers. A placement whose pod never appears is looked up by name.
  - apiGroups: [""]
    resources: [pods]
    verbs: [get, list, watch]
  # An Event on the driver reports an invalid ratio or base.
  - apiGroups: [events.k8s.io]
    resources: [events]
    verbs: [create]
  {{- if or $root.Values.reconciler.allowSpotFallback (gt (int64 $root.Values.settings.spotFallbackSeconds) 0) }}
  # An executor that finds no spot is deleted, so that Spark creates another one, unless an Event says that a node is on its
  # way.
  - apiGroups: [""]
    resources: [pods]
    verbs: [delete]
  - apiGroups: [""]
    resources: [events]
    verbs: [list]
  {{- end }}
{{- include "spot-balancer.bindWhereJobsRun" (list $root $component (printf "%s-reconcile" $account)) }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component (printf "%s-nodes" $account)) | nindent 2 }}
rules:
  # The capacity type of the node on which an executor runs.
  - apiGroups: [""]
    resources: [nodes]
    verbs: [list, watch]
---
{{ include "spot-balancer.bindEverywhere" (list $root $component (printf "%s-nodes" $account)) }}
{{- if eq $root.Values.store "redis" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (printf "%s-leader" $account)) | nindent 2 }}
rules:
  # Elect one leader among the replicas. RBAC cannot restrict create to a name.
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [create]
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    resourceNames: [{{ include "spot-balancer.reconciler" $root | quote }}]
    verbs: [get, update]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (printf "%s-leader" $account)) | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ printf "%s-leader" $account | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ $account | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}
{{- end }}

{{/* Pods read the Redis URL and CA at startup only, and the pod template does not contain them. The checksum restarts
the pods when one of them changes. Passwords in files are read again. */}}
{{- define "spot-balancer.podAnnotations" -}}
{{- $root := index . 0 -}}
{{- $redis := $root.Values.redis -}}
{{- if and (eq $root.Values.store "redis") (or $redis.url $redis.ca) }}
checksum/redis: {{ printf "%s\n%s" $redis.url $redis.ca | sha256sum }}
{{- end }}
{{- with include "spot-balancer.redisPasswordChecksum" $root }}
{{ . }}
{{- end }}
{{- with (index . 1).podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The volumes of webhook and reconciler and their mounts: passwords and CA of external Redis servers, and those of the
values. A subPath would keep a changed password from the pod. */}}
{{- define "spot-balancer.sharedMounts" -}}
{{- if eq .Values.store "redis" }}
{{- if .Values.redis.passwordSecret.name }}
- {name: redis-password, mountPath: /redis-password, readOnly: true}
{{- end }}
{{- if .Values.redis.sentinel.passwordSecret.name }}
- {name: redis-sentinel-password, mountPath: /redis-sentinel-password, readOnly: true}
{{- end }}
{{- if or .Values.redis.ca .Values.redis.caSecret.name }}
- {name: redis-ca, mountPath: /redis-ca, readOnly: true}
{{- end }}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "spot-balancer.sharedVolumes" -}}
{{- if eq .Values.store "redis" }}
{{- with .Values.redis.passwordSecret }}
{{- if .name }}
- name: redis-password
  secret:
    secretName: {{ .name | quote }}
    defaultMode: 0440
    items: [{key: {{ .key | quote }}, path: password}]
{{- end }}
{{- end }}
{{- with .Values.redis.sentinel.passwordSecret }}
{{- if .name }}
- name: redis-sentinel-password
  secret:
    secretName: {{ .name | quote }}
    defaultMode: 0440
    items: [{key: {{ .key | quote }}, path: password}]
{{- end }}
{{- end }}
{{- if .Values.redis.ca }}
- name: redis-ca
  configMap: {name: {{ printf "%s-ca" (include "spot-balancer.redis" .) | quote }}}
{{- else if .Values.redis.caSecret.name }}
- name: redis-ca
  secret:
    secretName: {{ .Values.redis.caSecret.name | quote }}
    defaultMode: 0440
    items: [{key: {{ .Values.redis.caSecret.key | quote }}, path: ca.crt}]
{{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The namespace in which helm test creates an executor, as a dry run. Empty: there is no test. */}}
{{- define "spot-balancer.testNamespace" -}}
{{- if .Values.helmTest.enabled -}}
{{- .Values.helmTest.namespace | default (.Values.namespaces.names | default (list "") | first) }}
{{- end }}
{{- end }}
