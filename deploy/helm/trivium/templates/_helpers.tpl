{{/* An image by digest if it has one, else by tag: (list $ image) */}}
{{- define "trivium.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 -}}
{{ $root.Values.imageRegistry }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "trivium.labels" -}}
{{- if gt (len .Release.Name) 47 }}
{{- fail "a release name may have 47 characters, or the names of its services and jobs would be too long" }}
{{- end -}}
app.kubernetes.io/part-of: trivium
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Selects the pods of a stage: (list $ stage) */}}
{{- define "trivium.selector" -}}
{app: {{ (index . 0).Release.Name }}-{{ index . 1 }}}
{{- end }}

{{/* The rollout settings that all three deployments share: (list $ stage values) */}}
{{- define "trivium.rollout" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 }}{{ $values := index . 2 -}}
# A new pod has to be ready for longer than DNS answers are cached (5 s by default in a cluster)
# before an old one is told to stop.
minReadySeconds: 10
strategy: {{ $values.strategy | default (dict "rollingUpdate" (dict "maxSurge" 1 "maxUnavailable" 0)) | toJson }}
{{- if eq $root.Values.autoscaling.type "none" }}
replicas: {{ $values.replicas }}
{{- end }}
selector:
  matchLabels: {{ include "trivium.selector" (list $root $stage) }}
{{- end }}

{{- define "trivium.podLabels" -}}
{{- $root := index . 0 -}}
app: {{ $root.Release.Name }}-{{ index . 1 }}
app.kubernetes.io/part-of: trivium
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- end }}

{{/* The pod settings that all three stages share: (list $ stage values) */}}
{{- define "trivium.pod" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 }}{{ $values := index . 2 -}}
# Longer than DRAIN_NOTICE_SECONDS, DRAIN_SECONDS and process exit together.
terminationGracePeriodSeconds: {{ add $root.Values.drain.noticeSeconds $root.Values.drain.seconds 10 }}
enableServiceLinks: false
automountServiceAccountToken: false
# So the service is not process 1, which ignores SIGTERM while the model is being loaded.
shareProcessNamespace: true
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "trivium.selector" (list $root $stage) }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "trivium.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* A stage's drain settings, and those in its `env`: (list $ prefix values) */}}
{{- define "trivium.env" -}}
{{- $root := index . 0 }}{{ $prefix := index . 1 }}{{ $values := index . 2 -}}
# Endpoints take a moment to drop a pod that is terminating.
- {name: {{ $prefix }}_DRAIN_NOTICE_SECONDS, value: {{ $root.Values.drain.noticeSeconds | quote }}}
- {name: {{ $prefix }}_DRAIN_SECONDS, value: {{ $root.Values.drain.seconds | quote }}}
{{- range $name, $value := $values.env }}
{{- /* Numbers in values files are floats, which from a million on are written with an exponent. */}}
{{- if and (kindIs "float64" $value) (eq $value (floor $value)) }}{{ $value = int64 $value }}{{ end }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* The keys that a gRPC port requires; with neither keys nor certificates, the network policy protects it:
     (list $ prefix) */}}
{{- define "trivium.guard" -}}
{{- $root := index . 0 }}{{ $prefix := index . 1 -}}
{{- if $root.Values.apiKeys.stages.enabled }}
- {name: {{ $prefix }}_API_KEYS_FILE, value: "/keys/{{ $root.Values.apiKeys.secretKey }}"}
{{- else if and $root.Values.networkPolicy.enabled (ne $root.Values.tls.grpc "mutual") }}
# The network policy admits only the calling stage, and to tokenizers also internal clients.
- {name: {{ $prefix }}_ALLOW_UNAUTHENTICATED_REMOTE, value: "true"}
{{- end }}
{{- include "trivium.serverTls" (list $prefix $root.Values.tls.grpc "/tls") }}
{{- end }}

{{/* TLS of a port: (list prefix none|tls|mutual folder) */}}
{{- define "trivium.serverTls" -}}
{{- $prefix := index . 0 }}{{ $tls := index . 1 }}{{ $folder := index . 2 -}}
{{- if ne $tls "none" }}
- {name: {{ $prefix }}_TLS_CERT_FILE, value: {{ $folder }}/tls.crt}
- {name: {{ $prefix }}_TLS_KEY_FILE, value: {{ $folder }}/tls.key}
{{- end }}
{{- if eq $tls "mutual" }}
- {name: {{ $prefix }}_TLS_CLIENT_CA_FILE, value: {{ $folder }}/ca.crt}
{{- end }}
{{- end }}

{{/* The key and certificates for calls to the next stage: (list $ prefix stage) */}}
{{- define "trivium.channel" -}}
{{- $root := index . 0 }}{{ $prefix := index . 1 }}{{ $stage := index . 2 -}}
{{- if $root.Values.apiKeys.stages.enabled }}
- {name: {{ $prefix }}_API_KEY_FILE, value: /stage-key/{{ $stage }}}
{{- end }}
{{- if ne $root.Values.tls.grpc "none" }}
- {name: {{ $prefix }}_TLS_CA_FILE, value: /tls/ca.crt}
{{- end }}
{{- if eq $root.Values.tls.grpc "mutual" }}
- {name: {{ $prefix }}_TLS_CERT_FILE, value: /tls/tls.crt}
- {name: {{ $prefix }}_TLS_KEY_FILE, value: /tls/tls.key}
{{- end }}
{{- end }}

{{/* The probe of a gRPC stage; probes do not support gRPC over TLS: (list $ grpc metricsPort path) */}}
{{- define "trivium.probe" -}}
{{- if eq (index . 0).Values.tls.grpc "none" -}}
grpc: {{ index . 1 }}
{{- else -}}
httpGet: {port: {{ index . 2 }}, path: {{ index . 3 }}}
{{- end }}
{{- end }}

{{/* The volumes with a stage's keys and certificates: (list $ stage) */}}
{{- define "trivium.secretVolumes" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 -}}
{{- if $root.Values.apiKeys.stages.enabled }}
{{- if ne $stage "facade" }}
- name: keys
  secret: {secretName: {{ $root.Values.apiKeys.secretName }}}
{{- end }}
{{- if ne $stage "generator" }}
# Only its own key.
- name: stage-key
  secret: {secretName: {{ $root.Values.apiKeys.stages.secretName }}, items: [{key: {{ $stage }}, path: {{ $stage }}}]}
{{- end }}
{{- end }}
{{- if ne $root.Values.tls.grpc "none" }}
- name: tls
  secret: {secretName: {{ get $root.Values.tls.secretNames $stage }}}
{{- end }}
{{- end }}

{{/* Their mounts: (list $ stage) */}}
{{- define "trivium.secretMounts" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 -}}
{{- if $root.Values.apiKeys.stages.enabled }}
{{- if ne $stage "facade" }}
- {name: keys, mountPath: /keys, readOnly: true}
{{- end }}
{{- if ne $stage "generator" }}
- {name: stage-key, mountPath: /stage-key, readOnly: true}
{{- end }}
{{- end }}
{{- if ne $root.Values.tls.grpc "none" }}
- {name: tls, mountPath: /tls, readOnly: true}
{{- end }}
{{- end }}

{{/* The port of the REST service. */}}
{{- define "trivium.restPort" -}}
{{ if eq .Values.tls.rest "none" }}80{{ else }}443{{ end }}
{{- end }}

{{/* An init container that waits for the model: (list $ image) */}}
{{- define "trivium.waitForModel" -}}
{{- $root := index . 0 -}}
# Exports appear in the volume atomically, by a rename.
- name: wait-for-model
  image: {{ include "trivium.image" . }}
  imagePullPolicy: {{ $root.Values.imagePullPolicy }}
  command:
    - sh
    - -c
    - |
      until [ -f "$MODEL_DIRECTORY/genai_config.json" ]; do
        echo "waiting for the model in $MODEL_DIRECTORY" >&2
        sleep 2
      done
  env:
    - {name: MODEL_DIRECTORY, value: {{ $root.Values.model.directory | quote }}}
  {{- include "trivium.containerSecurity" . | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    - {name: models, mountPath: /models, readOnly: true}
{{- end }}

{{/* A PodDisruptionBudget: (list $ stage) */}}
{{- define "trivium.disruption" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $root.Release.Name }}-{{ $stage }}
  labels:
    {{- include "trivium.labels" $root | nindent 4 }}
spec:
  # Not minAvailable: 1, which would block draining the node of a single replica.
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{ include "trivium.selector" . }}
{{- end }}
