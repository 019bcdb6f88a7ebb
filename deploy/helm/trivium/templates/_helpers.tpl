{{/* An image by its digest, or else by its tag: (list $ image) */}}
{{- define "trivium.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 -}}
{{ $root.Values.imageRegistry }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "trivium.labels" -}}
app.kubernetes.io/part-of: trivium
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What finds the pods of a stage: (list $ stage) */}}
{{- define "trivium.selector" -}}
{app: {{ (index . 0).Release.Name }}-{{ index . 1 }}}
{{- end }}

{{/* What all three deployments say of their rollout: (list $ stage values) */}}
{{- define "trivium.rollout" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 }}{{ $values := index . 2 -}}
# A new pod is ready for longer than name servers remember an answer (5 s by default in a cluster)
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

{{/* What all three pods say of themselves: (list $ stage values) */}}
{{- define "trivium.pod" -}}
{{- $root := index . 0 }}{{ $stage := index . 1 }}{{ $values := index . 2 -}}
# Notice, drain and the last words.
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

{{/* The settings of a stage's drain, and those that `env` has: (list $ prefix values) */}}
{{- define "trivium.env" -}}
{{- $root := index . 0 }}{{ $prefix := index . 1 }}{{ $values := index . 2 -}}
# Endpoints take a moment to forget a pod that is leaving.
- {name: {{ $prefix }}_DRAIN_NOTICE_SECONDS, value: {{ $root.Values.drain.noticeSeconds | quote }}}
- {name: {{ $prefix }}_DRAIN_SECONDS, value: {{ $root.Values.drain.seconds | quote }}}
{{- range $name, $value := $values.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* An init container that waits for the model: (list $ image) */}}
{{- define "trivium.waitForModel" -}}
{{- $root := index . 0 -}}
# Exports appear in the volume as a whole, by a rename.
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
  # Not minAvailable: 1, which would keep the node of a single replica from ever being drained.
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels: {{ include "trivium.selector" . }}
{{- end }}
